"""A checkpoint in, a folder that can be deployed out; and what is refused."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from prunelle.cli import main

ROWS = {
    "fp32": ("onnx", "model.onnx"),
    "fp16": ("onnx-fp16", "model_fp16.onnx"),
    "int8-dynamic": ("onnx-int8", "model_quantized.onnx"),
    "int8-static": ("onnx-int8-static", "model_int8.onnx"),
    "int4": ("onnx-int4", "model_q4.onnx"),
}


def texts_of(file: str) -> list[str]:
    with open(file, encoding="utf-8") as lines:
        return [row["sentence"] for row in csv.DictReader(lines)]


def unlabelled(file: str, target: Path) -> str:
    target.write_text("\n".join(["sentence", *texts_of(file)]))
    return str(target)


@pytest.fixture(scope="module")
def exported(reviews: dict[str, str], teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All variants of the teacher, compared on the validation file, calibrated on texts without labels."""
    folder = tmp_path_factory.mktemp("export")
    words = ["--model_name_or_path", teacher, "--variants", *ROWS, "--output_dir", str(folder / "run")]
    words += ["--validation_file", reviews["--validation_file"], "--max_seq_length", "24", "--latency_seconds", "0"]
    words += ["--calibration_file", unlabelled(reviews["--train_file"], folder / "texts.csv")]
    assert main(["export", *words, "--calibration_samples", "64"]) == 0
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["run"]
    return folder / "run"


def test_the_folder_has_the_layout_that_clients_look_for(exported: Path) -> None:
    """Prevents files under names that transformers.js and optimum do not find, and a report of another file."""
    report = json.loads((exported / "report.json").read_text())
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows) == ["model", *(name for name, _ in ROWS.values())]
    assert report["reference"] == "model"
    assert {path.name for path in (exported / "onnx").iterdir()} == {file for _, file in ROWS.values()}
    for name, file in ROWS.values():
        assert rows[name]["size_bytes"] == (exported / "onnx" / file).stat().st_size
        assert rows[name]["flips"]["total"] == 64
    assert rows["onnx"]["flips"]["count"] == 0
    assert rows["onnx"]["metrics"]["accuracy"] == rows["model"]["metrics"]["accuracy"] > 0.9
    assert min(row["metrics"]["accuracy"] for row in rows.values()) > 0.9
    differences = [row["max_abs_logit_difference"] for row in rows.values()]
    assert len(set(differences)) == len(differences)


def test_stock_libraries_load_it(exported: Path, teacher: str) -> None:
    """Prevents a folder whose configuration or tokenizer is not the model's."""
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    assert AutoConfig.from_pretrained(exported).id2label == model.config.id2label
    inputs = AutoTokenizer.from_pretrained(exported)(["a lovely film", "dull"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits.numpy()
    for name, file in ROWS.values():
        session = onnxruntime.InferenceSession(exported / "onnx" / file)
        wanted = [tensor.name for tensor in session.get_inputs()]
        (logits,) = session.run(["logits"], {each: inputs[each].numpy() for each in wanted})
        assert (logits.argmax(-1) == expected.argmax(-1)).all(), name
    assert not list(exported.glob("*.safetensors"))


def test_the_record_says_how_to_do_it_again(exported: Path) -> None:
    """Prevents a deployed file of which nobody knows what it was calibrated on, or how its model came about."""
    record = json.loads((exported / "compression.json").read_text())
    assert record["methods"] == ["export"]
    assert record["recipe"]["variants"] == list(ROWS)
    assert record["recipe"]["calibration_samples"] == 64
    assert record["source"]["methods"] == ["finetune"]


def test_without_data_it_says_that_nothing_was_compared(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents an export that nobody compared from passing for one that was."""
    words = ["--model_name_or_path", teacher, "--variants", "int8-dynamic", "--output_dir", str(tmp_path / "run")]
    assert main(["export", *words]) == 0
    printed = capsys.readouterr().out
    assert "Predictions were not compared" in printed
    assert re.search(r"onnx/model_quantized\.onnx: \d+\.\d MB", printed)
    assert {path.name for path in (tmp_path / "run").rglob("*.*")} == {
        "README.md",
        "model_quantized.onnx",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "compression.json",
    }


def test_a_masked_language_model_is_compared_at_its_masks(
    reviews: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents the head from being taken for a classifier's because no --task was given."""
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("\n".join(texts_of(reviews[f"--{split}_file"])))
    data = [f"--{split}_file={tmp_path / split}.txt" for split in ("train", "validation")]
    config = {"model_type": "bert", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    training = [
        "--task",
        "masked-lm",
        "--model_config",
        json.dumps(config),
        "--max_steps",
        "2",
        "--disable_tqdm",
        "true",
    ]
    length = ["--max_seq_length", "24"]
    assert main(["finetune", *training, *data, *length, "--output_dir", str(tmp_path / "model")]) == 0
    words = ["--model_name_or_path", str(tmp_path / "model"), *data, *length, "--output_dir", str(tmp_path / "run")]
    variants = ["--variants", "fp32", "int8-static", "--calibration_method", "entropy", "--calibration_samples", "32"]
    assert main(["export", *words, *variants, "--latency_seconds", "0"]) == 0
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["models"]
    assert [row["name"] for row in rows] == ["model", "onnx", "onnx-int8-static"]
    assert rows[1]["flips"]["count"] == 0
    assert rows[0]["flips"]["total"] > 10
    assert np.isfinite(rows[2]["metrics"]["loss"])


SPOILED: dict[str, tuple[dict[str, str], str]] = {
    "no model": ({"--model_name_or_path": ""}, r"no model: give --model_name_or_path"),
    "no such folder": ({"--model_name_or_path": "nowhere"}, r"no folder nowhere"),
    "not a checkpoint": ({"--model_name_or_path": "{tmp}/empty"}, r"empty is not a checkpoint that can be loaded"),
    "no head": ({"--model_name_or_path": "{tmp}/bare"}, r"bare is BertModel: only models named …ForSequence"),
    "an unknown variant": ({"--variants": "int3"}, r"--variants: invalid choice: 'int3'"),
    "an odd block": ({"--int4_block_size": "33"}, r"--int4_block_size\S*: invalid choice: 33"),
    "an old opset": ({"--opset_version": "11"}, r"--opset_version 11 is too low"),
    "nothing to calibrate on": (
        {"--variants": "int8-static", "--validation_file": "{validation}"},
        r"int8-static has no data to calibrate on: give --calibration_file",
    ),
    "calibration of nothing": ({"--calibration_file": "{validation}"}, r"--calibration_file is for int8-static"),
    "no such column": (
        {"--validation_file": "{validation}", "--label_column_name": "stars"},
        r"no column 'stars' in .*it has: sentence, label",
    ),
    "another task": (
        {"--task": "masked-lm"},
        r"--task masked-lm is not what .* is for, a BertForSequenceClassification",
    ),
    "other labels": ({"--validation_file": "{tmp}/other.csv"}, r"predicts bad, good, but .* labelled no, yes"),
    "too long": ({"--validation_file": "{validation}", "--max_seq_length": "65"}, r"65 is more than the 64 positions"),
    "unknown flag": ({"--variant": "fp32"}, r"unknown flag --variant; the nearest is --variants"),
}


@pytest.mark.parametrize(("change", "expected"), SPOILED.values(), ids=SPOILED)
def test_what_cannot_be_exported_ends_in_one_line_and_leaves_nothing(
    change: dict[str, str],
    expected: str,
    reviews: dict[str, str],
    teacher: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prevents half-written folders, which are deployed when nobody reads the log."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("sentence,label\na film,yes\na book,no\n")
    if "bare" in str(change):
        AutoModel.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
    places = {"tmp": str(tmp_path), "validation": reviews["--validation_file"]}
    words = {
        "--model_name_or_path": teacher,
        "--output_dir": str(tmp_path / "new" / "run"),
        "--max_seq_length": "24",
        **{name: value.format(**places) for name, value in change.items()},
    }
    capsys.readouterr()
    assert main(["export", *(word for pair in words.items() if pair[1] for word in pair)]) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert re.search(expected, line)
    assert "Traceback" not in error
    assert not (tmp_path / "new").is_dir() or not list((tmp_path / "new").iterdir())


def test_a_folder_that_holds_something_is_left_alone(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents the files of one model beside those of another."""
    (tmp_path / "report.json").write_text("{}")
    assert main(["export", "--model_name_or_path", teacher, "--output_dir", str(tmp_path)]) == 2
    assert f"{tmp_path} already holds something: give another --output_dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
