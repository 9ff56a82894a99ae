"""Which of the teacher's layers each of the student's layers is compared with."""

from prunelle.errors import InputError


def explicit_pairs(text: str, flag: str) -> list[tuple[int, int]] | None:
    """The (teacher, student) pairs of a value such as `1:0,3:1,5:2`; None for `uniform` and `last`.

    Raises:
        InputError: It is none of these, or names a layer of the student twice.
    """
    if text in ("uniform", "last"):
        return None
    try:
        pairs = [(int(teacher), int(student)) for teacher, student in (pair.split(":") for pair in text.split(","))]
    except ValueError:
        raise InputError(f"{flag} {text} must be uniform, last, or pairs teacher:student such as 1:0,3:1,5:2") from None
    if len({student for _, student in pairs}) != len(pairs):
        raise InputError(f"{flag} {text} names a layer of the student more than once")
    return pairs


def layer_pairs(text: str, flag: str, teacher_depth: int, student_depth: int) -> list[tuple[int, int]]:
    """The (teacher, student) pairs of layers that a flag asks for, counted from 0.

    `last` is the last of each. `uniform` spreads the student's layers evenly over the teacher's, last to last: of
    12 teacher layers, 4 student layers get 2, 5, 8 and 11, as in TinyBERT (arXiv:1909.10351).

    Raises:
        InputError: The flag cannot be read, or names a layer that does not exist.
    """
    pairs = explicit_pairs(text, flag)
    if pairs is None:
        every = [(max(round((i + 1) * teacher_depth / student_depth), 1) - 1, i) for i in range(student_depth)]
        return every if text == "uniform" else every[-1:]
    for whose, depth, layers in (
        ("teacher", teacher_depth, [teacher for teacher, _ in pairs]),
        ("student", student_depth, [student for _, student in pairs]),
    ):
        if unknown := [layer for layer in layers if not 0 <= layer < depth]:
            raise InputError(f"{flag} {text}: the {whose} has no layer {unknown[0]}, its layers are 0 to {depth - 1}")
    return pairs
