"""The built-in data set: what it must never hold, and that it is the same for every process and machine."""

import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import datasets
import pytest
from packaging.requirements import Requirement

from prunelle.errors import InputError
from prunelle.tasks import docstrings
from prunelle.tasks.docstrings import clean, load_docstrings


@pytest.fixture(scope="module")
def splits() -> datasets.DatasetDict:
    return load_docstrings()


@pytest.fixture(scope="module")
def texts(splits: datasets.DatasetDict) -> list[str]:
    return [text for split in splits.values() for text in split["text"]]


def show(found: list[str]) -> str:
    return f"{len(found)} texts, such as {found[:3]}"


def test_every_installation_has_every_library():
    """Prevents classes that depend on what else happens to be installed on a machine."""
    required, open_names = set(), ["prunelle"]
    while open_names:
        name = open_names.pop().lower().replace("_", "-")
        if name not in required:
            required.add(name)
            requirements = [Requirement(line) for line in metadata.distribution(name).requires or []]
            open_names += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    named = {library.replace("_", "-") for library in docstrings.LIBRARIES} - {docstrings.STANDARD_LIBRARY}
    assert named <= required


def test_classes_are_balanced_within_the_rule(splits):
    """Prevents a class that swamps the rest, that is too small to be learned, or missing from a split."""
    names = splits["train"].features["label"].names
    assert tuple(names) == docstrings.LIBRARIES
    counts = {split: Counter(rows["label"]) for split, rows in splits.items()}
    for label in range(len(names)):
        total = sum(count[label] for count in counts.values())
        assert docstrings.MIN_EXAMPLES <= total <= docstrings.MAX_EXAMPLES, names[label]
        assert min(count[label] for count in counts.values()) >= 20, names[label]


def test_no_text_names_a_library(texts):
    """Prevents a task that is solved by matching the library's name."""
    give_away = re.compile(
        r"torch|hugging ?face|transformers|numpy|pandas|networkx|sympy|onnx|tensorboard|tensorflow|python"
        r"|datasets|\bnp\.|\bpd\.|\bnx\.|\bhf_|_hf\b|\bnn\.|\bthe hub\b",
        re.I,
    )
    found = [text for text in texts if give_away.search(text)]
    assert not found, show(found)


@pytest.mark.parametrize(
    "markup",
    [
        *(r">>>", r"`", r"https?://", r"\bwww\.", r":\w+:", r"::(\s|$)", r"\s{2,}", r"[^\x20-\x7e]"),
        *(r"\.\. \w+", r"[-=~#]{3,}", r"\*\*", r"\\", r"[{}|]", r"</?(Tip|div|img|a)\b", r"\]\(", r"\(\s*\)"),
        *(r"\b(Args|Parameters|Raises|Returns):(\s|$)", r"(?i)copyright|all rights reserved"),
    ],
)
def test_no_text_holds_markup(texts, markup):
    """Prevents learning a project's docstring style instead of its subject."""
    found = [text for text in texts if re.search(markup, text)]
    # Prose about markup, such as "the Args: section", may slip through once in a thousand.
    assert len(found) <= len(texts) // 1000, show(found)


def test_lengths(texts):
    """Prevents texts too short to tell a class, and texts that any usual sequence length would cut."""
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= docstrings.MIN_WORDS
    assert max(lengths) <= docstrings.MAX_WORDS


def test_no_text_comes_twice(texts):
    """Prevents a test example that was trained on, also when only its numbers or punctuation differ."""
    letters = Counter(re.sub(r"[^a-z]+", " ", text.lower()).strip() for text in texts)
    found = [text for text, count in letters.items() if count > 1]
    assert not found, show(found)


def test_no_close_neighbours_across_splits(splits):
    """Prevents a leak by near duplicates: most of a test text standing in one training text."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z]+", text.lower())
        return set(zip(*(words[start:] for start in range(5)), strict=False))

    trained = set().union(*(runs(text) for text in splits["train"]["text"]))
    leaked = [t for t in splits["test"]["text"] if len(runs(t) & trained) > 0.6 * max(1, len(runs(t)))]
    assert len(leaked) <= len(splits["test"]) // 50, show(leaked)


def test_splits_follow_the_hash_of_the_text(splits):
    """Prevents texts that change their split with the order of files or the version of a library."""
    ranges = {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}
    assert set(splits) == set(ranges)
    for split, (first, end) in ranges.items():
        buckets = {int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 for text in splits[split]["text"]}
        assert buckets <= set(range(first, end)), split


def test_another_process_collects_the_same():
    """Prevents an order that hangs on PYTHONHASHSEED or on the file system."""
    code = (
        "import hashlib; from prunelle.tasks import docstrings;"
        "print(hashlib.sha256(repr(docstrings._collect('tensorboard', set())).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = hashlib.sha256(repr(docstrings._collect("tensorboard", set())).encode()).hexdigest()
    assert other.stdout.strip() == here


def test_bag_of_words_learns_it_but_not_perfectly(splits):
    """Prevents labels that say nothing about the text, and give-aways that no name list foresaw."""
    classes = range(len(splits["train"].features["label"].names))
    words = [Counter() for _ in classes]
    for text, label in zip(splits["train"]["text"], splits["train"]["label"], strict=True):
        words[label].update(set(re.findall(r"\w+", text.lower())))
    vocabulary = len(set(itertools.chain(*words)))
    sizes = [sum(counts.values()) + 0.1 * vocabulary for counts in words]

    def predict(text: str) -> int:  # naive Bayes
        found = set(re.findall(r"\w+", text.lower()))
        return max(classes, key=lambda c: sum(math.log((words[c][w] + 0.1) / sizes[c]) for w in found))

    test = splits["test"]
    hits = sum(predict(text) == label for text, label in zip(test["text"], test["label"], strict=True))
    assert 0.65 < hits / len(test) < 0.9


def test_cleaning_keeps_the_prose_and_nothing_else():
    """Prevents that an innocent change of a pattern lets code, types or names through, or eats sentences."""
    docstring = """Apply :class:`~torch.nn.Linear` to ``x`` as `Smith <https://a.b>`_ does [1]_.

.. note:: nothing of this

    indented_code()

A **second** paragraph about PyTorch's from_numpy, see [the guide](https://a.b/c), that is kept::

    x = 1

>>> forward(x)
2

Args:
    x (int): The input, which is not kept.
"""
    kept = "Apply Linear to x as Smith does. A second paragraph about, see the guide, that is kept:"
    assert clean(docstring) == kept


@pytest.mark.parametrize(
    "docstring",
    [
        "Too short for a class.",
        "Args:\n    x: nothing but arguments, however many words are written about each one of them here.",
        "labels (`Tensor` of shape `(n,)`, *optional*): An argument's description that has no heading above.",
        "Copyright 2020 of somebody who has reserved all rights and gives no warranty whatsoever for this.",
        ">>> a = [1, 2, 3]\n>>> b = [4, 5, 6]\n>>> a + b + a + b + a + b\n[1, 2, 3, 4, 5, 6]",
        "x_1 = f(2) + g_3 ; y[0] -> z.w @ 4 ** 5 : a_b == c_d // 7 <= 8 != 9",
    ],
)
def test_cleaning_drops_what_is_no_description(docstring):
    """Prevents examples without a subject."""
    assert clean(docstring) == ""


def test_long_texts_end_with_a_sentence():
    """Prevents texts cut in the middle of a sentence where a whole one would do."""
    sentence = "Here are exactly seven words of prose."
    assert clean(" ".join([sentence] * 30)) == " ".join([sentence] * (docstrings.MAX_WORDS // 7))


@pytest.fixture
def small_set(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and one library to fill it from."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(docstrings, "LIBRARIES", ("tensorboard",))
    return tmp_path


def test_second_load_comes_from_the_cache(small_set, monkeypatch):
    """Prevents that every run, and every process of a run, pays for reading the sources."""
    first = load_docstrings()
    monkeypatch.setattr(docstrings, "_build", lambda: pytest.fail("built again"))
    second = load_docstrings()
    assert [second[split].to_dict() for split in second] == [first[split].to_dict() for split in first]
    assert len(list(small_set.iterdir())) == 1, "temporary folders were left behind"


def test_new_version_of_a_library_is_read_anew(small_set, monkeypatch):
    """Prevents a cache that outlives what it was made from."""
    before = docstrings._fingerprint()
    monkeypatch.setattr(docstrings.platform, "python_version", lambda: "3.99.0")
    assert docstrings._fingerprint() != before


def test_the_first_of_two_writers_wins(tmp_path):
    """Prevents that two processes that start together break each other's cache."""
    one, two = (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": [text]})) for text in ("one", "two"))
    docstrings._save_atomically(one, tmp_path / "set")
    docstrings._save_atomically(two, tmp_path / "set")
    assert datasets.load_from_disk(str(tmp_path / "set"))["train"]["text"][:] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_stripped_sources_are_one_clear_line(small_set, monkeypatch):
    """Prevents training on nothing where an image carries no docstrings."""
    monkeypatch.setattr(docstrings, "_docstrings", lambda path: iter(()))
    with pytest.raises(InputError, match="builtin:docstrings is empty") as raised:
        load_docstrings()
    assert "\n" not in str(raised.value)
    assert not list(small_set.iterdir()), "an empty set was cached"


def test_function_names_are_words_beside_a_sentence(small_set):
    """Prevents names that are no words, texts of more than a sentence, and an example that comes twice."""
    splits = docstrings.load_function_names()
    pairs = [(row["text"], row["target"]) for split in splits.values() for row in split]
    assert len(pairs) > 50
    assert len({text for text, _ in pairs}) == len(pairs)
    for text, target in pairs:
        assert re.fullmatch(r"([a-z]+|\d+)( ([a-z]+|\d+)){1,5}", target), target
        assert len(text.split()) >= docstrings.MIN_WORDS_OF_A_FUNCTION
        assert not docstrings.SENTENCE_END.search(text), text


DOCUMENTED = """Do it.

Args:
    ids (`List[int]`, *optional*):
        Numbers, e.g. two
        of them. By default three.
    `max_len`: The longest of all
    x (int): One thing.

        And more: this.

Returns:
    z: nothing of it.
"""


def test_parameters_are_explained_where_they_are_said_to_be():
    """Prevents answers cut in the middle of a sentence, and headings and returned values taken for parameters."""
    found = docstrings.explained_parameters(DOCUMENTED)
    assert [(name, " ".join(answer.split())) for name, answer, _ in found] == [
        ("ids", "Numbers, e.g. two of them"),
        ("max_len", "The longest of all"),
        ("x", "One thing"),
    ]
    assert all(DOCUMENTED[start:].startswith(answer) for _, answer, start in found)


def test_questions_have_their_answers_in_the_context(small_set, monkeypatch):
    """Prevents questions that anything answers where there is one parameter alone, and contexts that come twice."""
    monkeypatch.setattr(docstrings, "LIBRARIES", ("datasets",))
    rows = [row for split in docstrings.load_parameters().values() for row in split]
    assert len(rows) > 20
    assert len({row["context"] for row in rows}) == len(rows)
    for row in rows:
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start:].startswith(text)
        assert len(text.split()) <= docstrings.MAX_WORDS_OF_AN_ANSWER
        assert len(docstrings.explained_parameters(row["context"])) > 1


@pytest.mark.parametrize(
    ("name", "words"),
    [("get_HTMLPage2", ["get", "HTML", "Page", "2"]), ("_toJSON", ["to", "JSON"]), ("__init__", ["init"])],
)
def test_names_fall_into_words(name, words):
    assert docstrings.NAME_PART.findall(name) == words
