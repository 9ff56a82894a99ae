"""From files to what the Trainer reads."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from transformers import BertConfig

from prunelle.errors import InputError
from prunelle.tasks import TASKS, DataArguments, DistillationDataArguments, TextClassification
from prunelle.tasks.tokenizer import train_tokenizer

ROWS = [
    {"id": 1, "Review": "null", "stars": "five"},
    {"id": 2, "Review": 'He said "no", twice', "stars": "one"},
    {"id": 3, "Review": "N/A", "stars": "None"},
    {"id": 4, "Review": "a\ttab, a comma", "stars": "one"},
]


def write(path: Path) -> Path:
    frame = pandas.DataFrame(ROWS)
    if path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def classification(path: Path, **more: Any) -> Any:
    file = str(path)
    return TASKS["text-classification"](
        DataArguments(train_file=file, validation_file=file, label_column_name="stars", **more), 0
    )


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_holds_the_same_examples(tmp_path: Path, ending: str) -> None:
    """Prevents "null" and "N/A" from being read as missing, and columns from being found by position."""
    task = classification(write(tmp_path / f"rows{ending}"))
    assert task.class_names == ["None", "five", "one"]
    assert task.splits["train"][:] == {"text": [r["Review"] for r in ROWS], "label": [r["stars"] for r in ROWS]}


def test_validation_data_is_held_out_by_the_seed(tmp_path: Path) -> None:
    """Prevents a teacher and a student that were validated on each other's training data."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(100)))
    arguments = DataArguments(train_file=str(path), validation_split_percentage=10)
    first, second, other = (TASKS["text-classification"](arguments, seed).splits for seed in (0, 0, 1))
    assert len(first["validation"]) == 10
    assert not set(first["validation"]["text"]) & set(first["train"]["text"])
    assert first["validation"]["text"][:] == second["validation"]["text"][:] != other["validation"]["text"][:]


@pytest.mark.parametrize("ending", [".csv", ".txt"])
def test_unlabeled_text_has_no_label_and_trains_no_teacher(tmp_path: Path, ending: str) -> None:
    """Prevents a label that stands in the file from being learned, and one teacher for each unlabeled file."""
    labelled, unlabeled = write(tmp_path / "rows.jsonl"), tmp_path / f"more{ending}"
    unlabeled.write_text("Review,stars\nanother text,seven\n" if ending == ".csv" else "another text\n")
    files = {"train_file": str(labelled), "validation_file": str(labelled), "label_column_name": "stars"}
    task: Any = TASKS["text-classification"](DistillationDataArguments(**files, unlabeled_file=str(unlabeled)), 0)
    alone: Any = TASKS["text-classification"](DataArguments(**files), 0)
    assert task.class_names == ["None", "five", "one"]
    encoded = task.encode(train_tokenizer([row["Review"] for row in ROWS], 300))  # type: ignore[misc]
    assert encoded["unlabeled"]["labels"][:] == [-101]
    assert encoded["train"]["labels"][:] == [1, 2, 0, 2]
    assert encoded["unlabeled"].features == encoded["train"].features  # so that the two can be joined
    assert task.fingerprint() != alone.fingerprint() == task.fingerprint(unlabeled=False)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["one", "None", "five"], [1, 2, 0]),  # by name, in the model's order
        (["ONE", "none", "Five", "two"], [1, 2, 0]),  # whatever the case, and it may know more
    ],
)
def test_a_trained_head_keeps_its_label_order(tmp_path: Path, names: list[str], expected: list[int]) -> None:
    """Prevents label 0 of the data from being taken for class 0 of the model."""
    task = classification(write(tmp_path / "rows.csv"))
    task.adopt(BertConfig(id2label=dict(enumerate(names))), "teacher")
    assert [task.class_index[name] for name in ("None", "five", "one")] == expected
    tokenizer = train_tokenizer([row["Review"] for row in ROWS], 300)  # type: ignore[misc]
    assert task.encode(tokenizer)["train"]["labels"][:] == [task.class_index[row["stars"]] for row in ROWS]


def test_a_head_of_other_labels_is_refused(tmp_path: Path) -> None:
    """Prevents words from being matched to numbered classes by guess."""
    task = classification(write(tmp_path / "rows.csv"))
    with pytest.raises(InputError, match="must be the same"):
        task.adopt(BertConfig(num_labels=3), "teacher")


def test_numbers_are_matched_by_number(tmp_path: Path) -> None:
    """Prevents a file of 0 and 1 from being refused by a model that calls them by name."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(6)))
    task: Any = TASKS["text-classification"](DataArguments(train_file=str(path), validation_file=str(path)), 0)
    task.adopt(BertConfig(id2label={0: "negative", 1: "positive"}), "teacher")
    assert task.class_index == {0: 0, 1: 1}
    assert task.class_names == ["negative", "positive"]


def test_text_is_packed_into_full_blocks(tmp_path: Path) -> None:
    """Prevents padding, lost words between blocks, and documents that run into each other."""
    lines = [f"line {number} of the text" for number in range(300)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(lines))
    task = TASKS["masked-lm"](
        DataArguments(task="masked-lm", train_file=str(path), validation_file=str(path), max_seq_length=32), 0
    )
    tokenizer = train_tokenizer(lines, 400)
    blocks = task.encode(tokenizer)["train"]["input_ids"][:]
    assert {len(block) for block in blocks} == {32}
    assert {(block[0], block[-1]) for block in blocks} == {(tokenizer.cls_token_id, tokenizer.sep_token_id)}
    packed = [token for block in blocks for token in block[1:-1]]
    separated = [t for ids in tokenizer(lines, add_special_tokens=False)["input_ids"] for t in [*ids, 3]]
    assert packed == separated[: len(packed)]
    assert len(separated) - len(packed) < 30


def test_evaluation_masks_do_not_change(tmp_path: Path) -> None:
    """Prevents two models, or two epochs, from being asked different questions."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {number} of the text" for number in range(200)))
    tokenizer = train_tokenizer(path.read_text().splitlines(), 400)

    def encode(seed: int, **flags: Any) -> Any:
        arguments = DataArguments(
            task="masked-lm", train_file=str(path), validation_file=str(path), max_seq_length=32, **flags
        )
        return TASKS["masked-lm"](arguments, seed).encode(tokenizer)

    first, second, other = encode(7), encode(7), encode(8)
    assert first["validation"][:] == second["validation"][:] != other["validation"][:]
    labels = np.array(first["validation"]["labels"])
    assert (labels != -100).mean() == pytest.approx(0.15 * 30 / 32, abs=0.03)

    assert first["train"].column_names == ["input_ids"]
    fixed = encode(7, static_masking=True)
    assert fixed["validation"][:] == first["validation"][:]
    assert fixed["train"][:] == encode(7, static_masking=True)["train"][:] != fixed["train"].select([0])[:]
    assert (np.array(fixed["train"]["labels"]) != -100).any(1).all()


def test_masks_that_stay_are_other_data(tmp_path: Path) -> None:
    """Prevents a teacher trained on masks drawn once from passing for one that saw new ones in every epoch."""
    (tmp_path / "text.txt").write_text("a bird in the hand\n" * 9)
    flags: dict[str, Any] = {"task": "masked-lm", "train_file": str(tmp_path / "text.txt")}
    prints = {
        TASKS["masked-lm"](DataArguments(**flags, static_masking=static), 0).fingerprint() for static in (True, False)
    }
    assert len(prints) == 2
    with pytest.raises(InputError, match="--static_masking is for --task masked-lm"):
        DataArguments(**(flags | {"task": "causal-lm"}), static_masking=True)


def test_a_stream_is_read_as_it_trains(tmp_path: Path) -> None:
    """Prevents a data set larger than the disk from being downloaded first, and its head from training too."""
    (tmp_path / "data").mkdir()
    rows = [{"text": f"document {number} has some words in it"} for number in range(60)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = DataArguments(
        task="masked-lm", dataset_name=str(tmp_path / "data"), streaming=True, max_eval_samples=20, max_seq_length=16
    )
    task = TASKS["masked-lm"](arguments, 0)
    assert isinstance(task.splits["train"], datasets.IterableDataset)
    assert task.splits["validation"]["text"][:] == [row["text"] for row in rows[:20]]
    tokenizer = train_tokenizer((row["text"] for row in rows), 400)
    encoded = task.encode(tokenizer)
    first = next(iter(encoded["train"]))["input_ids"]
    assert tokenizer.decode(first, skip_special_tokens=True).startswith(" document 20 has")
    assert task.collator(tokenizer, encoded)([{"input_ids": first}])["labels"].shape == (1, 16)


def test_tokenizers_trained_on_the_same_texts_are_the_same() -> None:
    """Prevents runs that cannot be repeated: WordPiece training breaks ties at random."""
    texts = [f"{a}{b} {b}{a}" for a in "abcdefgh" for b in "uvwxyz"]
    first, second = train_tokenizer(texts, 320), train_tokenizer(texts, 320)
    assert first.get_vocab() == second.get_vocab()
    assert first.decode(first("Äh, the hand!")["input_ids"], skip_special_tokens=True).strip() == "ah, the hand!"


def test_metrics_against_naive_counts() -> None:
    """Prevents a macro average over classes that do not occur."""
    predictions, references = np.array([0, 0, 1, 3, 3]), np.array([0, 1, 1, 3, 0])
    metrics = TextClassification.compute_metrics(predictions, references)
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["f1"] == pytest.approx((2 * 1 / 4 + 2 * 1 / 3 + 2 * 1 / 3) / 3)
