"""Pairs of texts: both are read, together, wherever texts are."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import FILLER, TEACHER_CONFIG
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prunelle.cli import main
from prunelle.errors import InputError
from prunelle.export.footprint import Footprint
from prunelle.tasks import TASKS, DataArguments, DistillationDataArguments
from prunelle.tasks.tokenizer import train_tokenizer

COLUMNS = ["--text_column_name", "premise", "--text_pair_column_name", "hypothesis"]


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[str, list[dict[str, Any]]]:
    """A file, and its rows: the label is the share of the first text's words that the second has."""
    draw = random.Random(0)
    rows = []
    for _ in range(64):
        first = draw.choices(FILLER, k=6)
        second = draw.sample(first, 3) + draw.choices(FILLER, k=3)
        share = len(set(first) & set(second)) / len(set(first))
        rows.append({"premise": " ".join(first), "hypothesis": " ".join(second), "label": share})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path), rows


def arguments(path: str, **more: Any) -> DistillationDataArguments:
    given: dict[str, Any] = {"text_column_name": "premise", "text_pair_column_name": "hypothesis", **more}
    return DistillationDataArguments(train_file=path, validation_file=path, problem_type="regression", **given)


def test_both_texts_are_read_as_a_pair(pairs: tuple[str, list[dict[str, Any]]]) -> None:
    """Prevents a second text that is left out, or is glued to the first without the mark between the two."""
    path, rows = pairs
    task: Any = TASKS["text-classification"](arguments(path), 0)
    tokenizer = train_tokenizer(task.texts(), 300)
    tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    other = train_tokenizer(task.texts(), 280)
    encoded = task.encode(tokenizer, {"teacher_1_": other})
    for split in ("train", "validation"):
        for row, source in zip(encoded[split], rows, strict=True):
            texts = source["premise"], source["hypothesis"]
            assert row["input_ids"] == tokenizer(*texts)["input_ids"]
            assert set(row["token_type_ids"]) == {0, 1}
            assert row["teacher_1_input_ids"] == other(*texts)["input_ids"]
    assert sorted(task.texts()) == sorted(row[name] for row in rows for name in ("premise", "hypothesis"))
    assert task.collator(tokenizer, encoded)([encoded["train"][0]])["labels"].tolist() == [
        pytest.approx(rows[0]["label"])
    ]


def test_another_second_text_is_other_data(pairs: tuple[str, list[dict[str, Any]]]) -> None:
    """Prevents a cache or a teacher of other pairs from passing for those of these."""
    path, rows = pairs
    second = [None, "hypothesis"]
    prints = {
        TASKS["text-classification"](arguments(path, text_pair_column_name=name), 0).fingerprint() for name in second
    }
    Path(path).write_text("\n".join(json.dumps(row | {"hypothesis": "the sea"}) for row in rows))
    prints.add(TASKS["text-classification"](arguments(path), 0).fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_pair_column_name": "hypothesys"}, r"no column 'hypothesys' in .*nearest is 'hypothesis'"),
        ({"text_pair_column_name": "premise"}, r"'premise' cannot be both texts of a pair"),
        ({"label_column_name": "hypothesis"}, r"'hypothesis' cannot be both the text and the label"),
        ({"task": "masked-lm"}, r"--text_pair_column_name hypothesis is for --task text-classification"),
    ],
)
def test_pairs_that_are_none(pairs: tuple[str, list[dict[str, Any]]], given: dict[str, Any], message: str) -> None:
    """Prevents a flag that is read and does nothing, and a text that is compared with itself."""
    with pytest.raises(InputError, match=message):
        TASKS["text-classification"](arguments(pairs[0], **given), 0)


def test_a_missing_second_text_is_named(tmp_path: Path) -> None:
    """Prevents a pair of one text from being trained on."""
    path = tmp_path / "pairs.csv"
    path.write_text("text,second,label\na,b,0\na,,1\n")
    given = DataArguments(train_file=str(path), validation_file=str(path), text_pair_column_name="second")
    with pytest.raises(InputError, match=r"example 2: column 'second' holds no text but ''"):
        TASKS["text-classification"](given, 0)


def test_the_road_from_pairs_to_a_report(
    pairs: tuple[str, list[dict[str, Any]]], short_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a command that reads one text where training read two: its figures would be of something else."""
    monkeypatch.setattr("prunelle.export.comparison.measure_footprint", lambda *_, **__: Footprint(0.0, 0))
    path, rows = pairs
    words = ["--problem_type", "regression", *COLUMNS, "--validation_file", path, "--max_seq_length", "24"]
    run = str(tmp_path / "run")
    made = ["--model_config", json.dumps(TEACHER_CONFIG), *short_run, "--max_steps", "4", "--train_file", path]
    assert main(["finetune", *words, *made, "--output_dir", run]) == 0
    trained = json.loads((tmp_path / "run" / "compression.json").read_text())["metrics"]["eval_mse"]

    files = ["--model_name_or_path", run, "--task", "text-classification", "--variants", "fp32", "int8-static"]
    files += ["--calibration_file", path, "--latency_seconds", "0", "--output_dir", str(tmp_path / "files")]
    assert main(["export", *words, *files]) == 0
    for model in json.loads((tmp_path / "files" / "report.json").read_text())["models"][:2]:
        assert model["metrics"]["mse"] == pytest.approx(trained, rel=1e-3)

    opposite = AutoModelForSequenceClassification.from_pretrained(run)
    opposite.classifier.weight.data.neg_()
    opposite.save_pretrained(tmp_path / "opposite")
    AutoTokenizer.from_pretrained(run).save_pretrained(tmp_path / "opposite")
    models = ["--reference", run, "--candidates", str(tmp_path / "files/onnx/model.onnx"), str(tmp_path / "opposite")]
    models += ["--shapes", "1x8", "--latency_seconds", "0", "--output_dir", str(tmp_path / "report")]
    assert main(["compare", *words, *models]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())["models"]
    for model in report[:2]:
        assert model["metrics"]["mse"] == pytest.approx(trained, rel=1e-3)
    changed = report[2]["flips"]["examples"]
    assert changed
    for flip in changed:
        row = rows[flip["example"] - 1]
        assert flip["text"] == f"{row['premise']} | {row['hypothesis']}"

    # The code of the model cards asks about pairs.
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "files"):
        (snippet, *others) = re.findall(r"```python\n(.*?)\n```", Path(folder, "README.md").read_text(), re.DOTALL)
        assert ("transformers" if folder == "run" else "onnxruntime") in snippet
        exec(snippet, {})
        assert all("text_pair" in other for other in others)
    assert "transformers.js" not in Path("files", "README.md").read_text().split("## How to run it")[1]
