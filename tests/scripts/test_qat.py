"""The road through the command line: a trained model in, an int8 file that predicts alike out."""

import json
import re
from pathlib import Path

import onnx
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prunelle.cli import main
from prunelle.compression import from_pretrained
from prunelle.compression.quantization import Int8Weight


@pytest.fixture
def sound(reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path) -> dict[str, str]:
    """Flags of a run that would work."""
    named = dict(zip(short_run[::2], short_run[1::2], strict=True))
    return {**reviews, **named, "--model_name_or_path": teacher, "--output_dir": str(tmp_path / "run")}


def qat(flags: dict[str, str], *more: str) -> int:
    return main(["qat", *(word for pair in flags.items() for word in pair), *more])


def test_a_trained_model_is_quantized_with_itself_as_teacher(sound: dict[str, str], tmp_path: Path) -> None:
    """Prevents a checkpoint that only this package loads, and a file that quantizes what was not trained for it."""
    words = ["--max_steps", "8", "--learning_rate", "1e-4", "--unquantized_modules", "classifier"]
    assert qat(sound, *words, "--quantization_start", "0.25", "--keep_accuracy", "50") == 0
    run = tmp_path / "run"
    AutoModelForSequenceClassification.from_pretrained(run)
    sensitivity = json.loads((run / "sensitivity.json").read_text())
    assert (len(sensitivity["modules"]), sensitivity["left_out"]) == (4 * 6 + 1, [])
    record = json.loads((run / "compression.json").read_text())
    assert record["methods"] == ["distill", "quantize"]
    assert "density" not in record
    assert not (run / "density.svg").exists()
    assert record["quantization"]["scheme"] == "int8-dynamic"
    assert len(record["quantization"]["linear"]) == 4 * 6 + 1
    operators = [node.op_type for node in onnx.load(run / "onnx" / "model_quantized.onnx").graph.node]
    assert operators.count("MatMulInteger") == 4 * 6 + 1
    assert operators.count("MatMul") == 1
    report = json.loads((run / "report.json").read_text())
    accuracy = {m["name"]: m["metrics"]["accuracy"] for m in report["models"]}
    assert accuracy["onnx-int8"] > 0.9


def test_distilled_pruned_and_quantized_in_one_run(sound: dict[str, str], teacher: str, tmp_path: Path) -> None:
    """Prevents a shrunk model whose int8 file quantizes other modules, or that was not pruned before it was rounded,
    a flag of the pruning that is not heeded, and a record that does not say what was pruned."""
    few = tmp_path / "few.csv"
    few.write_text("sentence,label\nthe film was lovely,good\nthe film was dull,bad\na dull story,bad\n")
    sound |= {"--train_file": str(few), "--validation_file": str(few), "--test_file": str(few)}
    sound["--prune_vocabulary"] = "train"
    words = ["--student_layers", "0,3", "--prune", "true", "--structure", "heads", "ffn", "--density", "0.5"]
    words += ["--score", "magnitude", "--round_to", "1", "--save_sparse", "true"]
    assert qat(sound, *words, "--max_steps", "8") == 0
    run = tmp_path / "run"
    record = json.loads((run / "compression.json").read_text())
    assert record["methods"] == ["distill", "prune", "quantize"]
    assert len(record["density"]) == 2 * 6
    assert all(0.45 < density <= 0.5 for density in record["density"].values())  # some of those left are rounded to 0
    assert (run / "density.svg").read_text().count(" % of its weights are left") == 2 * 6
    assert [file.name for file in run.glob("*.safetensors")] == ["model_sparse.safetensors"]
    small = from_pretrained(run)
    assert small.config.vocab_size < AutoModelForSequenceClassification.from_pretrained(teacher).config.vocab_size
    assert [tuple(layer.output.dense.weight.shape) for layer in small.bert.encoder.layer] == [(32, 32)] * 2
    operators = [node.op_type for node in onnx.load(run / "onnx" / "model_quantized.onnx").graph.node]
    assert operators.count("MatMulInteger") == len(record["quantization"]["linear"]) == 2 * 6 + 2
    weight = small.bert.encoder.layer[1].intermediate.dense.weight.detach()
    torch.testing.assert_close(Int8Weight(1)(weight), weight, rtol=1e-6, atol=0)


SPOILED = {
    "pruning that is not meant": ({"--density": "0.3"}, r"nothing is pruned without --prune true"),
    "no such module": (
        {"--quantized_modules": "*.atention.*"},
        r"the pattern \*\.atention\.\* matches none of the 26 ",
    ),
    "never": ({"--quantization_start": "1"}, r"starts at 1\.0 of the run and ranges freeze at 0\.9"),
    "nothing to learn": ({"--activation_ranges": "learned"}, r"int8-dynamic has no ranges to learn"),
    "not points": ({"--keep_accuracy": "-1"}, r"--keep_accuracy -1\.0 must be points of accuracy"),
    "no such scheme": ({"--scheme": "int3"}, r"--scheme.*'int3'"),
}


@pytest.mark.parametrize(("change", "expected"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_flag_is_named(
    sound: dict[str, str], change: dict[str, str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents hours of training on a typing error."""
    capsys.readouterr()
    assert qat(sound | change) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert re.search(expected, line)
    assert not list(Path(sound["--output_dir"]).glob("*.safetensors"))
