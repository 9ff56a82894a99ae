"""What the losses on hidden states have in common."""

from torch import Tensor, nn

from prunelle.losses._numerics import at_least_float32, full_precision


def comparable(
    student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor, projection: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Student and teacher states in one space and at least in float32, the student's projected where asked.

    Raises:
        ValueError: Their shapes are not alike, or the mask does not fit them.
    """
    student, teacher = at_least_float32(student_hidden), at_least_float32(teacher_hidden)
    if projection is not None:
        with full_precision(student):
            student = projection(student)
    if student.shape != teacher.shape or student.dim() != 3 or attention_mask.shape != student.shape[:-1]:
        projected = "" if projection is None else f", projected to {tuple(student.shape)}"
        raise ValueError(
            f"student hidden states {tuple(student_hidden.shape)}{projected}, teacher hidden states "
            f"{tuple(teacher_hidden.shape)} and attention mask {tuple(attention_mask.shape)} must be "
            "(batch, tokens, hidden) twice and (batch, tokens)"
        )
    return student, teacher
