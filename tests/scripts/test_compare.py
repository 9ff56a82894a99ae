"""Comparing models through the command line: checkpoints and ONNX files in, one report out."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from prunelle.cli import main
from prunelle.export import export_onnx, quantize_dynamic
from prunelle.export.candidates import Candidate
from prunelle.export.footprint import Footprint, measure_footprint

EVIL = "<script>alert(1)</script>"


@pytest.fixture(autouse=True, scope="module")
def one_process_a_format() -> Iterator[None]:
    """A fresh process for every model would take most of these tests' time, to import the libraries."""
    measured: dict[str, Footprint] = {}

    def measure(candidate: Candidate, *arguments: Any, **options: Any) -> Footprint:
        if candidate.format not in measured:
            measured[candidate.format] = measure_footprint(candidate, *arguments, **options)
        return measured[candidate.format]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunelle.export.comparison.measure_footprint", measure)
        yield


@pytest.fixture(scope="module")
def test_file(reviews: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The test reviews, and one that is HTML."""
    path = tmp_path_factory.mktemp("data") / "test.csv"
    path.write_text(Path(reviews["--test_file"]).read_text() + f"{EVIL} a lovely warm film,good\n")
    return str(path)


@pytest.fixture(scope="module")
def models(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher in other guises: exported, with its classes in the other order, and contrary."""
    folder = tmp_path_factory.mktemp("models")
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    for name in ("exported", "reordered", "contrary"):
        tokenizer.save_pretrained(folder / name)
    model.config.save_pretrained(folder / "exported")
    file = export_onnx(model, folder / "exported" / "onnx" / "model.onnx", input_names=tokenizer.model_input_names)
    quantize_dynamic(file, folder / "exported" / "onnx" / "model_quantized.onnx")
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter.flip(0))
    model.save_pretrained(folder / "contrary")
    names = list(reversed(model.config.id2label.values()))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(folder / "reordered")
    return folder


def words(teacher: str, test_file: str, output_dir: Path, *candidates: object) -> list[str]:
    return [
        *("compare", "--reference", teacher, "--candidates", *map(str, candidates), "--test_file", test_file),
        *("--output_dir", str(output_dir), "--max_seq_length", "24", "--shapes", "1x8", "2x24"),
        *("--latency_seconds", "0.2"),
    ]


def test_every_format_in_one_report(teacher: str, models: Path, test_file: str, tmp_path: Path) -> None:
    """Prevents classes read in another order, a candidate left out, and figures without their texts."""
    candidates = (models / "exported", models / "reordered", models / "contrary", f"torch-bf16:{teacher}")
    assert main(words(teacher, test_file, tmp_path / "report", *candidates)) == 0
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.md", "report.html"}
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in report["models"]}
    formats = {name: row["format"] for name, row in rows.items()}
    assert formats == {
        "checkpoint": "torch",
        "model.onnx": "onnx",
        "model_quantized.onnx": "onnx-int8",
        "reordered": "torch",
        "contrary": "torch",
        "checkpoint (torch-bf16)": "torch-bf16",
    }
    with open(test_file, encoding="utf-8") as file:
        texts = {row["sentence"] for row in csv.DictReader(file)}
    flips = {name: row["flips"]["count"] for name, row in rows.items()}
    assert flips["model.onnx"] == flips["reordered"] == 0
    assert rows["reordered"]["max_abs_logit_difference"] < 1e-5
    assert flips["contrary"] == report["data"]["examples"] == 49
    assert {flip["text"] for flip in rows["contrary"]["flips"]["examples"]} == texts
    assert rows["contrary"]["against_reference"]["p_value"] < 0.05
    right = round(49 * rows["checkpoint"]["metrics"]["accuracy"])
    assert rows["contrary"]["against_reference"]["worse"] == right > 40
    assert sum(map(sum, rows["contrary"]["confusion"])) == 49
    for row in rows.values():
        assert set(row["latency_ms"]) == {"1x8", "2x24"}
        assert row["load_seconds"] > 0
        assert row["parameters"] == pytest.approx(rows["checkpoint"]["parameters"], rel=0.002)
        assert 0 < row["compressed_bytes"] < row["size_bytes"]
    assert "&lt;script&gt;alert(1)" in (tmp_path / "report" / "report.html").read_text()
    for name in ("report.md", "report.html"):
        assert "<script" not in (tmp_path / "report" / name).read_text()


def test_masked_language_models_are_compared_word_by_word(
    reviews: dict[str, str], short_run: list[str], tmp_path: Path
) -> None:
    """Prevents a report on other masked words than those that were scored."""
    with open(reviews["--train_file"], encoding="utf-8") as file:
        (tmp_path / "train.txt").write_text("\n".join(row["sentence"] for row in csv.DictReader(file)))
    config = {"model_type": "bert", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    common = ["--task", "masked-lm", "--train_file", str(tmp_path / "train.txt")]
    arguments = ["--model_config", json.dumps(config), "--output_dir", str(tmp_path / "model"), *short_run]
    assert main(["finetune", *common, *arguments, "--num_train_epochs", "8", "--learning_rate", "5e-3"]) == 0
    compared = words(str(tmp_path / "model"), str(tmp_path / "train.txt"), tmp_path / "report")
    compared[4:4] = [f"torch-bf16:{tmp_path / 'model'}"]
    assert main([*compared, "--task", "masked-lm", "--max_eval_samples", "60"]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    reference, half = report["models"]
    assert half["flips"]["count"] == len(half["flips"]["examples"])
    assert all("[MASK]" in flip["text"] or flip["label"] for flip in half["flips"]["examples"])
    assert report["classes"] is None
    assert "confusion" not in reference


def spoiled_onnx(path: Path, input_name: str) -> Path:
    """A file that takes `input_name` and gives logits, its weights outside its folder when that is a text's."""
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [2], [1.0, 2.0])
    if input_name == "input_ids":
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="../../weights")
    nodes = [
        helper.make_node("Cast", [input_name], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "weight"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info(input_name, TensorProto.INT64, [1, 2])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.parent.mkdir(parents=True)
    path.write_bytes(model.SerializeToString())
    return path


def test_bad_input_ends_in_one_line_and_leaves_nothing(
    teacher: str, models: Path, test_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a traceback, a long wait before it, and a folder that looks like a report."""
    AutoModel.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
    (tmp_path / "no_label.csv").write_text("sentence\na film\n")
    (tmp_path / "other.csv").write_text("sentence,label\na film,sad\na dog,happy\n")
    (tmp_path / "foreign").mkdir()
    shutil.copy(models / "exported" / "onnx" / "model.onnx", tmp_path / "foreign")
    pixels = spoiled_onnx(tmp_path / "pixels" / "model.onnx", "pixel_values")
    escaping = spoiled_onnx(tmp_path / "escaping" / "model.onnx", "input_ids")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    out, bf16 = tmp_path / "report", f"torch-bf16:{teacher}"

    def sound(*candidates: object) -> list[str]:
        return words(teacher, test_file, out, *candidates)

    cases = {
        r"no column named label .*it has: sentence": words(teacher, f"{tmp_path}/no_label.csv", out, bf16),
        r"labelled happy, sad: they must be the same": words(teacher, f"{tmp_path}/other.csv", out, bf16),
        r"no file .*nowhere\.csv": words(teacher, f"{tmp_path}/nowhere.csv", out, bf16),
        r"full already holds something": words(teacher, test_file, tmp_path / "full", bf16),
        r"takes pixel_values .*only input_ids, attention_mask, token_type_ids": sound(pixels),
        r"keeps its weights in '\.\./\.\./weights', which is not in its folder": sound(escaping),
        r"holds no trained ForSequenceClassification": sound(tmp_path / "bare"),
        r"no config.json with .*foreign": words(f"{tmp_path}/foreign/model.onnx", test_file, out, teacher),
        r"--max_seq_length 65 is more than the 64 tokens": [*sound(bf16), "--max_seq_length", "65"],
        r"no format 'torch-int8'; there is torch": sound(f"torch-int8:{teacher}"),
        r"nothing to compare: give --candidates": ["compare", "--reference", teacher, "--test_file", test_file],
        r"no model to hold the others against": ["compare", "--candidates", teacher],
        r"no data: give --test_file": [
            *("compare", "--reference", teacher, "--candidates", bf16, "--output_dir", str(out))
        ],
        r"a shape is written batch x tokens": [*sound(bf16), "--shapes", "1*8"],
    }
    for expected, line in cases.items():
        capsys.readouterr()
        assert main(line) == 2, expected
        errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
        assert len(errors) == 1
        assert re.search(expected, errors[0])
        assert not out.exists()
    assert not list(tmp_path.glob(".unfinished-*"))
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert onnx.load(models / "exported" / "onnx" / "model.onnx").graph.node
