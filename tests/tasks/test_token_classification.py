"""Tags from words to tokens, and from tokens to entities."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import BertConfig

from prunelle.errors import InputError
from prunelle.export import Runner, evaluate
from prunelle.tasks import TASKS, DataArguments, metrics
from prunelle.tasks.metrics import EntityF1
from prunelle.tasks.tokenizer import train_tokenizer

ROWS = [
    {"tokens": ["Ada", "Lovelace", "visits", "Unbelievabletown"], "ner_tags": ["B-PER", "I-PER", "O", "B-LOC"]},
    {"tokens": ["nobody", "writes"], "ner_tags": ["O", "O"]},
    {
        "tokens": ["Lovelace", "writes", "to", "Ada", "in", "Town"],
        "ner_tags": ["B-PER", "O", "O", "B-PER", "O", "B-LOC"],
    },
]


def tokens_task(path: Path, rows: list[dict[str, Any]] = ROWS, **more: Any) -> Any:
    path.write_text("\n".join(map(json.dumps, rows)))
    file = str(path)
    arguments = DataArguments(task="token-classification", train_file=file, validation_file=file, **more)
    return TASKS["token-classification"](arguments, 0)


def test_a_tag_is_asked_at_the_first_token_of_its_word(tmp_path: Path) -> None:
    """Prevents tags that slide to the next word, and long words that weigh more than short ones."""
    task = tokens_task(tmp_path / "rows.jsonl")
    tokenizer = train_tokenizer(["the cat writes to nobody"] * 9, 270)
    encoded = task.encode(tokenizer)["train"]
    for row, original in zip(encoded, ROWS, strict=True):
        asked = [place for place, label in enumerate(row["labels"]) if label != -100]
        assert [task.class_names[row["labels"][place]] for place in asked] == original["ner_tags"]
        ends = [*asked[1:], len(row["input_ids"]) - 1]
        words = [tokenizer.decode(row["input_ids"][a:b]).strip() for a, b in zip(asked, ends, strict=True)]
        assert words == [word.lower() for word in original["tokens"]]
        assert len(row["labels"]) == len(row["input_ids"]) > len(words) + 2
    batch = task.collator(tokenizer, encoded)([encoded[0], encoded[1]])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_words_beyond_the_last_token_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents a score over the beginnings of sentences that passes for one over sentences."""
    task = tokens_task(tmp_path / "rows.jsonl", max_seq_length=5)
    encoded = task.encode(train_tokenizer(["ada lovelace writes"] * 99, 300))
    asked = sum(label != -100 for labels in encoded["train"]["labels"] for label in labels)
    assert 2 < asked < 12
    assert f"{12 - asked} of 12 words have no token within --max_seq_length 5" in caplog.text


def test_named_numbers_keep_their_names(tmp_path: Path) -> None:
    """Prevents ClassLabel numbers from being sorted, or called 0, 1, 2."""
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    features = datasets.Features(
        {"words": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = [{"words": row["tokens"], "tags": row["ner_tags"]} for row in ROWS]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    file = str(tmp_path / "rows.parquet")
    task: Any = TASKS["token-classification"](
        DataArguments(task="token-classification", train_file=file, validation_file=file), 0
    )
    assert task.class_names == names
    assert task.splits["train"]["tags"][0] == [1, 2, 0, 3]
    task.adopt(BertConfig(id2label=dict(enumerate(reversed(names)))), "teacher")
    assert task.class_index == {0: 3, 1: 2, 2: 1, 3: 0}


def naive_entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """Every span, asked one by one whether it is an entity."""
    found = set()
    for start in range(len(tags)):
        for end in range(start + 1, len(tags) + 1):
            kind = tags[start][2:]
            before = tags[start - 1][2:] if start else ""
            begins = tags[start][0] == "B" or (tags[start][0] == "I" and before != kind)
            goes_on = all(tag == f"I-{kind}" for tag in tags[start + 1 : end])
            ends = end == len(tags) or tags[end] != f"I-{kind}"
            if begins and goes_on and ends:
                found.add((kind, start, end))
    return found


CASES = {
    "all right": (["B-A", "I-A", "O", "B-B"], ["B-A", "I-A", "O", "B-B"], (2, 2, 2)),
    "a word short": (["B-A", "O", "O", "B-B"], ["B-A", "I-A", "O", "B-B"], (1, 2, 2)),
    "another type": (["B-A", "I-B"], ["B-A", "I-A"], (0, 2, 1)),
    "two neighbours for one": (["B-A", "B-A"], ["B-A", "I-A"], (0, 2, 1)),
    "one for two neighbours": (["B-A", "I-A"], ["B-A", "B-A"], (0, 1, 2)),
    "begun with I": (["O", "I-A", "I-A"], ["O", "B-A", "I-A"], (1, 1, 1)),
    "a type with a dash": (["B-a-b", "I-a-b"], ["B-a-b", "I-a-c"], (0, 1, 2)),
    "nothing found": (["O", "O"], ["O", "B-A"], (0, 0, 1)),
    "nothing to find": (["O", "O"], ["O", "O"], (0, 0, 0)),
}


@pytest.mark.parametrize(("predicted", "true", "counts"), CASES.values(), ids=CASES)
def test_entities_by_hand(predicted: list[str], true: list[str], counts: tuple[int, int, int]) -> None:
    """Prevents entities that count by halves, or that are told apart by their first word alone."""
    hits, found, wanted = counts
    result = metrics.compute([EntityF1], [predicted], [true])
    assert result["precision"] == (hits / found if found else 0)
    assert result["recall"] == (hits / wanted if wanted else 0)
    assert result["f1"] == (2 * hits / (found + wanted) if found + wanted else 0)


def test_entities_equal_the_naive_reference() -> None:
    """Prevents a chunk rule that holds for the cases one thinks of."""
    draw = random.Random(0)
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    predicted, true = ([draw.choices(tags, k=draw.randint(1, 9)) for _ in range(200)] for _ in range(2))
    predicted = [(row * 9)[: len(other)] for row, other in zip(predicted, true, strict=True)]
    pairs = [(naive_entities(p), naive_entities(t)) for p, t in zip(predicted, true, strict=True)]
    hits, found, wanted = (sum(map(len, sets)) for sets in zip(*((p & t, p, t) for p, t in pairs), strict=True))
    result = metrics.compute([EntityF1], predicted, true)
    assert result == pytest.approx(
        {"precision": hits / found, "recall": hits / wanted, "f1": 2 * hits / (found + wanted)}
    )


def test_an_entity_ends_with_its_sentence(tmp_path: Path) -> None:
    """Prevents the last word of a sentence and the first of the next from being one entity, and padding a word."""
    task = tokens_task(tmp_path / "rows.jsonl")
    number = task.class_names.index
    references = np.array([[-100, number("O"), number("I-PER")], [number("I-PER"), -100, -100]])
    predictions = np.array([[0, number("O"), number("I-PER")], [number("I-PER"), number("I-PER"), 0]])
    result = task.compute_metrics(predictions, references)
    assert result == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "accuracy": 1.0}
    together = task.compute_metrics(predictions.reshape(1, -1), references.reshape(1, -1))
    assert together["precision"] == 1.0
    references[1, 0] = number("B-PER")
    assert task.compute_metrics(predictions, references)["f1"] == 1.0
    assert task.compute_metrics(predictions.reshape(1, -1), references.reshape(1, -1))["f1"] == 0.0


def test_tags_that_name_no_entities_are_scored_one_by_one(tmp_path: Path) -> None:
    """Prevents parts of speech from being read as entities that begin anywhere."""
    rows = [{"tokens": ["a", "dog", "runs"], "tags": ["DET", "NOUN", "VERB"]}]
    task = tokens_task(tmp_path / "rows.jsonl", rows)
    result = task.compute_metrics(np.array([[0, 1, 1]]), np.array([[0, 1, 2]]))
    assert result == pytest.approx({"accuracy": 2 / 3, "f1": (1 + 2 / 3 + 0) / 3})


class Fixed(Runner):
    """Gives the logits that the batch holds."""

    name, format, size_bytes, parameters, input_names = "fixed", "torch", 0, 0, ()

    def __call__(self, batch: Any) -> np.ndarray:
        return batch["logits"].numpy()


def test_the_closing_table_counts_sentence_by_sentence(tmp_path: Path) -> None:
    """Prevents batches of other lengths from shifting the predictions against their words."""
    task = tokens_task(tmp_path / "rows.jsonl")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, len(task.class_names), generator=generator)
    labels = torch.randint(len(task.class_names), (6, 9), generator=generator)
    labels[torch.rand(6, 9, generator=generator) < 0.4] = -100
    labels[:4, 5:] = -100
    batches = [
        {"labels": labels[:4, :5], "logits": logits[:4, :5]},
        {"labels": labels[4:], "logits": logits[4:]},
    ]
    (result,) = evaluate([runner := Fixed()], batches, task.compute_metrics, reference=runner)
    expected = task.compute_metrics(logits.argmax(-1).numpy(), labels.numpy())
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert 0 < expected["f1"] < 1


REFUSED = {
    "no lists": ([{"tokens": "a dog", "tags": "O O"}], r"column 'tokens' holds no lists"),
    "a tag short": ([{"tokens": ["a", "dog"], "tags": ["O"]}], r"example 1: 2 words .* 1 tags"),
    "no words": ([{"tokens": ["a"], "tags": ["O"]}, {"tokens": [], "tags": []}], r"example 2: .*no words"),
    "a missing tag": ([{"tokens": ["a", "b"], "tags": ["O", None]}], r"example 1: column 'tags' holds no tag"),
    "one tag only": ([{"tokens": ["a", "b"], "tags": ["O", "O"]}], r"one label only, 'O'"),
    "no such column": ([{"text": ["a"], "sense": ["O"]}], r"no column named ner_tags or .*it has: text, sense"),
}


@pytest.mark.parametrize(("rows", "message"), REFUSED.values(), ids=REFUSED)
def test_rows_that_cannot_be_tagged(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    """Prevents words that are learned with their neighbour's tag."""
    with pytest.raises(InputError, match=message):
        tokens_task(tmp_path / "rows.jsonl", rows)


def test_a_tag_that_training_never_saw_is_named(tmp_path: Path) -> None:
    """Prevents a key error after the teacher has been loaded."""
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"tokens": ["a", "b"], "ner_tags": ["O", "B-ORG"]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    arguments = DataArguments(
        task="token-classification", train_file=str(tmp_path / "rows.jsonl"), validation_file=str(other)
    )
    with pytest.raises(InputError, match=r"other.jsonl, example 1: label 'B-ORG' \(occurs 1 times\)"):
        TASKS["token-classification"](arguments, 0)
