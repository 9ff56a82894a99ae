"""Answers from text to tokens, over windows, and back to text."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertConfig

from prunelle.errors import InputError
from prunelle.tasks import TASKS, DataArguments
from prunelle.tasks.metrics import AnswerMatch, compute
from prunelle.tasks.tokenizer import train_tokenizer

CONTEXT = "The lighthouse, built by Ada in 1907, stands near Geneva. " * 3 + "Its keeper was Grace Hopper."
ROWS = [
    {
        "context": CONTEXT,
        "question": "Who was its keeper?",
        "answers": {"text": ["Grace Hopper", "Hopper"], "answer_start": [189, 195]},
    },
    {
        "context": "Emmy lived in Bryn Mawr (Pennsylvania).",
        "question": "Where did she live?",
        "answers": {"text": ["Bryn Mawr"], "answer_start": [14]},
    },
]


def questions_task(path: Path, rows: list[dict[str, Any]] = ROWS, **more: Any) -> Any:
    path.write_text("\n".join(map(json.dumps, rows)))
    file = str(path)
    more = {"max_seq_length": 48, "doc_stride": 8, **more}
    arguments = DataArguments(task="question-answering", train_file=file, validation_file=file, **more)
    return TASKS["question-answering"](arguments, 0)


@pytest.fixture
def tokenizer() -> Any:
    return train_tokenizer([row[name] for row in ROWS for name in ("context", "question")] * 3, 120)


def test_labels_point_at_the_answer(tmp_path: Path, tokenizer: Any) -> None:
    """Prevents answers that lose a letter at a token's edge, and windows that are asked for what they do not hold."""
    task = questions_task(tmp_path / "rows.jsonl")
    windows = task.encode(tokenizer)["validation"]
    found: dict[int, set[str]] = {0: set(), 1: set()}
    for row in windows:
        assert len(row["input_ids"]) == 48
        start, end = row["labels"]
        if (start, end) == (0, 0):
            found[row["example"]].add("")
            continue
        context = ROWS[row["example"]]["context"]
        found[row["example"]].add(context[row["offsets"][start][0] : row["offsets"][end][1]])
    assert found == {0: {"", "Grace Hopper"}, 1: {"", "Bryn Mawr"}}
    assert windows["example"].count(0) > 2


def test_windows_overlap_and_miss_nothing(tmp_path: Path, tokenizer: Any) -> None:
    """Prevents words between two windows that no model ever reads."""
    windows = questions_task(tmp_path / "rows.jsonl").encode(tokenizer)["validation"]
    spans = [[tuple(span) for span in row["offsets"] if span[1]] for row in windows if row["example"] == 0]
    ids = tokenizer(CONTEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert sorted({span for window in spans for span in window}) == sorted({tuple(span) for span in ids})
    assert all(first[-8:] == second[:8] for first, second in itertools.pairwise(spans))


def confident(windows: Any, example: int, span: tuple[int, int], height: float) -> np.ndarray:
    """Logits that point at the tokens of one span of one example, in every window that holds it."""
    logits = np.zeros((len(windows), 2, 48), dtype=np.float32)
    for number, row in enumerate(windows):
        for token, (start, end) in enumerate(row["offsets"]):
            if row["example"] == example and end:
                logits[number, 0, token] = height * (start == span[0])
                logits[number, 1, token] = height * (end == span[1])
    return logits


def test_the_best_span_of_all_windows_is_the_answer(tmp_path: Path, tokenizer: Any) -> None:
    """Prevents an answer that is read from the first window alone, from the question, or backwards."""
    task = questions_task(tmp_path / "rows.jsonl")
    windows = task.encode(tokenizer)["validation"]
    logits = confident(windows, 0, (189, 201), 9.0) + confident(windows, 1, (14, 23), 9.0)
    logits[:, 0, 1], logits[:, 1, 2] = 50.0, 50.0  # tokens of the question
    found = task.read(logits, windows, "validation")
    assert found.values.tolist() == ["Grace Hopper", "Bryn Mawr"]
    assert found.errors.tolist() == [0.0, 0.0]
    assert found.references.tolist() == ["Grace Hopper / Hopper", "Bryn Mawr"]
    assert found.metrics == {"exact_match": 1.0, "f1": 1.0}
    # An end before the start is no span: of two crossed peaks the model can follow only one.
    crossed = confident(windows, 1, (14, 4), 9.0)
    (start, end) = (14, 4)
    assert task.read(crossed, windows, "validation").values.tolist()[1] != CONTEXT[start:end]
    assert task.read(crossed, windows, "validation").values.tolist()[1]


def test_margins_are_those_of_probabilities(tmp_path: Path, tokenizer: Any) -> None:
    """Against naive sums over all spans, in float64: an answer that two windows hold must not be its own rival."""
    task = questions_task(tmp_path / "rows.jsonl", max_answer_length=4)
    windows = task.encode(tokenizer)["validation"]
    logits = np.random.default_rng(0).normal(size=(len(windows), 2, 48)).astype(np.float32)
    found = task.read(logits, windows, "validation")
    for example, row in enumerate(ROWS):
        scores: dict[tuple[int, int], float] = {}
        for number, window in enumerate(windows):
            context = [token for token, (_, end) in enumerate(window["offsets"]) if end]
            for first in context:
                for last in context:
                    if window["example"] == example and 0 <= last - first < 4:
                        span = (window["offsets"][first][0], window["offsets"][last][1])
                        score = float(logits[number, 0, first]) + float(logits[number, 1, last])
                        scores[span] = max(score, scores.get(span, score))
        (best, first), (_, second) = sorted(scores.items(), key=lambda item: -item[1])[:2]
        total = sum(map(np.exp, scores.values()))
        assert found.values.tolist()[example] == row["context"][slice(*best)].strip()
        assert found.margins[example] == pytest.approx((np.exp(first) - np.exp(second)) / total)


def test_questions_without_an_answer(tmp_path: Path, tokenizer: Any) -> None:
    """Prevents a model that must answer although it was taught that there may be none."""
    nothing = {**ROWS[1], "question": "What did she eat?", "answers": {"text": [], "answer_start": []}}
    task = questions_task(tmp_path / "rows.jsonl", [*ROWS, nothing])
    windows = task.encode(tokenizer)["validation"]
    assert {tuple(row["labels"]) for row in windows if row["example"] == 2} == {(0, 0)}
    logits = confident(windows, 1, (14, 23), 9.0)
    logits[:, :, 0] = 5.0
    found = task.read(logits, windows, "validation")
    assert found.values.tolist() == ["", "Bryn Mawr", ""]
    assert found.errors.tolist() == [1.0, 0.0, 0.0]
    # Where training never showed that there may be none, there is always an answer.
    task = questions_task(tmp_path / "few.jsonl")
    windows = task.encode(tokenizer)["validation"]
    logits = np.zeros((len(windows), 2, 48), dtype=np.float32)
    logits[:, :, 0] = 5.0
    assert all(task.read(logits, windows, "validation").values.tolist())


def test_answers_are_counted_as_squad_counts() -> None:
    """Figures by hand, with the traps of the published script: articles, punctuation, several references."""
    predictions = ["The Eiffel Tower.", "in 1907", "", "Ada", ""]
    references = [["Eiffel tower", "a tower"], ["1907"], ["Geneva"], ["Grace", "Ada Lovelace"], []]
    found = compute([AnswerMatch], predictions, references)
    assert found["exact_match"] == pytest.approx(2 / 5)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0 + 2 / 3 + 1) / 5)


def test_answers_as_records_are_the_same(tmp_path: Path, tokenizer: Any) -> None:
    """Prevents a second form of SQuAD's column, one record an answer, that is read as something else."""
    records = [
        {**row, "answers": [{"text": t, "answer_start": s} for t, s in zip(*row["answers"].values(), strict=True)]}
        for row in ROWS
    ]
    tasks = [questions_task(tmp_path / "a.jsonl"), questions_task(tmp_path / "b.jsonl", records)]
    assert len({task.fingerprint() for task in tasks}) == 1


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"answers": {"text": ["Paris"], "answer_start": [3]}}, {}, r"example 1: the answer 'Paris' does not stand"),
        ({"answers": "Paris"}, {}, r"answers must be \{\"text\""),
        ({"question": " "}, {}, r"example 1: there is no question"),
        ({"question": "why " * 30}, {}, r"example 1: a question of \d+ tokens leaves \d+ .*--doc_stride"),
        ({}, {"doc_stride": 40}, r"--doc_stride 40"),
        ({}, {"doc_stride": -1}, r"--doc_stride -1 must not be negative"),
        ({}, {"max_answer_length": 0}, r"--max_answer_length 0"),
    ],
)
def test_data_that_cannot_be_used(
    change: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    """Prevents hours of training on labels that point beside the answer."""
    with pytest.raises(InputError, match=message):
        questions_task(tmp_path / "rows.jsonl", [{**ROWS[0], **change}], **more).encode(tokenizer)


def test_a_head_for_starts_and_ends(tmp_path: Path) -> None:
    """Prevents a head of as many outputs as some earlier task had classes."""
    config = BertConfig(num_labels=5)
    questions_task(tmp_path / "rows.jsonl").configure(config)
    assert config.num_labels == 2
