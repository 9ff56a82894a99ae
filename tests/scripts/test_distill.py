"""The road through the command line: text and a teacher in, a verified int8 student out."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from prunelle.cli import main
from prunelle.scripts import _closing

ROOT = Path(__file__).parents[2]


def quickstart(output_dir: Path, *more: str) -> list[str]:
    """The quickstart, shrunk: one layer of two, a fortieth of the data."""
    shrunk = {
        "teacher_config": json.dumps(
            {
                "model_type": "bert",
                "vocab_size": 600,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 64,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "initializer_range": 0.06,
                "layer_norm_eps": 1e-12,  # with this the JSON is longer than any file's name may be
            }
        ),
        "student_layers": "1",
        "max_train_samples": "192",
        "max_eval_samples": "64",
        "teacher_num_train_epochs": "1",
        "num_train_epochs": "1",
        "logging_steps": "1",
        "output_dir": str(output_dir),
    }
    recipe = ["--config", str(ROOT / "recipes" / "quickstart.yaml")]
    return [*recipe, *(f"--{key}={value}" for key, value in shrunk.items()), *more]


@pytest.fixture(scope="module")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    done = subprocess.run(
        [sys.executable, "scripts/distill.py", *quickstart(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_quickstart_closes_with_the_table(quickstart_run: tuple[Path, str]) -> None:
    """Prevents a run that ends without its evidence, or a report that says something else than the table."""
    folder, printed = quickstart_run
    report = json.loads((folder / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["teacher", "student", "onnx", "onnx-int8"]
    assert report["reference"] == "student"
    for model in report["models"]:
        (line,) = (line for line in printed.splitlines() if line.split()[:1] == [model["name"]])
        assert f"{model['metrics']['accuracy']:.4f}" in line
        assert set(model["latency_ms"]) == {"1x32", "16x64"}
        assert all(figures["p50"] <= figures["p95"] for figures in model["latency_ms"].values())
        assert model["flips"]["total"] == 64
    by_name = {model["name"]: model for model in report["models"]}
    assert by_name["onnx"]["flips"]["count"] == 0
    assert by_name["onnx"]["max_abs_logit_difference"] < 1e-4
    assert by_name["onnx-int8"]["size_bytes"] < by_name["onnx"]["size_bytes"]


def test_what_was_written_loads_in_stock_libraries(quickstart_run: tuple[Path, str]) -> None:
    """Prevents a checkpoint that only this project can load, or an ONNX file of another model."""
    folder, _ = quickstart_run
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 1
    inputs = tokenizer(["Returns the sum of the elements.", "Open a file."], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    wanted = {i.name for i in session.get_inputs()}
    feed = {name: value.numpy() for name, value in inputs.items() if name in wanted}
    (logits,) = session.run(["logits"], feed)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    (quantized,) = onnxruntime.InferenceSession(folder / "onnx" / "model_quantized.onnx").run(["logits"], feed)
    assert quantized.shape == expected.shape


def test_the_folder_says_how_it_was_made_and_holds_no_pickle(quickstart_run: tuple[Path, str]) -> None:
    """Prevents a result that nobody can make again, and a deployed folder that runs code when it is loaded."""
    folder, _ = quickstart_run
    record = json.loads((folder / "compression.json").read_text())
    assert record["recipe"]["student_layers"] == "1"
    assert {"prunelle", "torch", "transformers"} <= record["versions"].keys()
    terms = {"loss_soft_target", "loss_hard_label", "loss_hidden_cosine"}
    training = [entry for entry in record["training"] if "loss" in entry]
    evaluation = [entry for entry in record["training"] if "eval_loss" in entry]
    assert training
    assert all(terms <= entry.keys() for entry in training)
    assert all({f"eval_{term}" for term in terms} <= entry.keys() for entry in evaluation)
    assert all(
        entry["eval_loss"]
        == pytest.approx(
            5 * entry["eval_loss_soft_target"] + 2 * entry["eval_loss_hard_label"] + entry["eval_loss_hidden_cosine"]
        )
        for entry in evaluation
    )
    pickles = [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert pickles == []
    assert list(folder.glob("runs/*/events.out.tfevents*"))


def test_the_teacher_is_used_again_and_not_trained_again(
    quickstart_run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents every student from paying for its teacher; and a teacher of other data from passing for this one."""
    folder, _ = quickstart_run
    teacher = Path(f"{folder}-teacher")
    before = (teacher / "model.safetensors").stat().st_mtime_ns
    assert main(["distill", *quickstart(tmp_path / "second", f"--teacher_output_dir={teacher}")]) == 0
    assert (teacher / "model.safetensors").stat().st_mtime_ns == before

    capsys.readouterr()
    other = quickstart(tmp_path / "third", f"--teacher_output_dir={teacher}", "--max_train_samples=100")
    assert main(["distill", *other]) == 2
    assert re.fullmatch(r"error: .*trained on other data.*\n", capsys.readouterr().err)


def test_two_processes_reach_the_table_of_one(quickstart_run: tuple[Path, str], tmp_path: Path) -> None:
    """Prevents processes that each believe to be alone, and gradients that depend on their number.

    Half the batch on each of two processes is the batch of one; the quickstart has no dropout. The teacher is
    trained twice too: a classifier's own loss is doubled by the Trainer on two processes.
    """
    folder, _ = quickstart_run
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = quickstart(tmp_path / "run", "--per_device_train_batch_size=16")
    done = subprocess.run(
        [*launcher, "scripts/distill.py", *words], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((path / "report.json").read_text()) for path in (folder, tmp_path / "run"))
    for ours, theirs in zip(one["models"], two["models"], strict=True):
        assert theirs["flips"]["total"] == ours["flips"]["total"]
        assert theirs["metrics"]["accuracy"] == pytest.approx(ours["metrics"]["accuracy"], abs=1 / 64 + 1e-9)
        assert theirs["metrics"]["loss"] == pytest.approx(ours["metrics"]["loss"], abs=1e-3)
    assert done.stdout.count("teacher ") == 1
    records = [Path(f"{path}-teacher") / "compression.json" for path in (folder, tmp_path / "run")]
    trained = [json.loads(record.read_text()) for record in records]
    assert trained[1]["metrics"]["eval_loss"] == pytest.approx(trained[0]["metrics"]["eval_loss"], rel=1e-3)


def test_a_distilbert_from_a_trained_teacher(
    reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path
) -> None:
    """Prevents token types from reaching a model that has none, in training, in the tokenizer or in the export.

    And a run in bfloat16 that trains to its end and then finds that its model cannot be exported.
    """
    words = [w for pair in reviews.items() for w in pair]
    student = ["--teacher_name_or_path", teacher, "--student_architecture", "distilbert", "--num_train_epochs", "6"]
    arguments = [*words, *student, *short_run, "--learning_rate", "3e-3", "--output_dir", str(tmp_path / "run")]
    assert main(["distill", *arguments, "--bf16", "true", "--use_cpu", "true"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.model_type == "distilbert"
    assert set(model.config.label2id) == {"good", "bad"}
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path / "run")("a film")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    accuracy = {m["name"]: m["metrics"]["accuracy"] for m in report["models"]}
    assert accuracy["teacher"] > 0.9
    assert accuracy["student"] > 0.8
    assert max(m["max_abs_logit_difference"] for m in report["models"] if m["name"] == "onnx") < 1e-4


@pytest.fixture
def without_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a run after training: export and latencies take half a minute, and other tests see to them."""
    monkeypatch.setattr(_closing, "export_and_report", lambda *_, **__: Mock(to_text=str))
    monkeypatch.setattr(_closing, "write_card", Mock())


@pytest.mark.usefixtures("without_export")
def test_a_teacher_speaks_on_unlabeled_text(
    reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path
) -> None:
    """Prevents an unlabeled file that is read and not trained on: 4 labels alone leave this student at 0.6."""
    texts = [line.rsplit(",", 1)[0] for line in Path(reviews["--train_file"]).read_text().splitlines()]
    (tmp_path / "more.csv").write_text("\n".join(texts))
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0}
    words = [*(w for pair in reviews.items() for w in pair), "--teacher_name_or_path", teacher, *short_run]
    words += ["--max_train_samples", "4", "--unlabeled_file", str(tmp_path / "more.csv"), "--learning_rate", "3e-3"]
    words += ["--student_config", json.dumps(config), "--num_train_epochs", "10", "--hidden_cosine_weight", "0"]
    assert main(["distill", *words, "--output_dir", str(tmp_path / "run")]) == 0
    history = json.loads((tmp_path / "run" / "compression.json").read_text())["training"]
    assert history[-1]["eval_accuracy"] > 0.8
    assert history[-1]["step"] == 10 * math.ceil((4 + 256) / 32)


def test_a_teacher_that_was_asked_everything_is_not_loaded(
    reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents memory and time for a teacher that has nothing left to say; and a student that differs without it."""
    closings = Mock(return_value=Mock(to_text=str))
    monkeypatch.setattr(_closing, "export_and_report", closings)
    monkeypatch.setattr(_closing, "write_card", Mock())
    config = json.loads((Path(teacher) / "config.json").read_text())
    sizes = ("model_type", "hidden_size", "num_attention_heads", "max_position_embeddings", "hidden_dropout_prob")
    student = {name: config[name] for name in sizes} | {"num_hidden_layers": 1}
    words = [w for pair in reviews.items() for w in pair] + ["--teacher_name_or_path", teacher, teacher, *short_run]
    words += ["--student_config", json.dumps(student), "--hidden_cosine_weight", "0", "--num_train_epochs", "1"]
    words += ["--teacher_cache", str(tmp_path / "cache")]
    assert main(["distill", *words, "--output_dir", str(tmp_path / "first")]) == 0
    loaded = Mock(side_effect=AssertionError)
    monkeypatch.setattr("prunelle.trainers.models.from_pretrained", loaded)
    assert main(["distill", *words, "--output_dir", str(tmp_path / "second")]) == 0
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("first", "second"))
    assert all(torch.equal(other[name], weight) for name, weight in one.items())
    assert [call.kwargs["teacher"] is None for call in closings.call_args_list] == [False, True]

    of_the_teacher = [w for w in words if w not in ("--student_config", json.dumps(student))]
    with pytest.raises(AssertionError):
        main(["distill", *of_the_teacher, "--student_layers", "0", "--output_dir", str(tmp_path / "third")])
    loaded.assert_called_once()


def test_masked_language_models_are_distilled_on_plain_text(
    reviews: dict[str, str], short_run: list[str], tmp_path: Path
) -> None:
    """Prevents a masked-LM student whose file predicts other tokens than it does."""
    for split in ("train", "validation"):
        with open(reviews[f"--{split}_file"], encoding="utf-8") as file:
            lines = [row["sentence"] for row in csv.DictReader(file)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    config = {"model_type": "bert", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    words = ["--task", "masked-lm", "--teacher_config", json.dumps(config), "--finetune_teacher"]
    words += [f"--{split}_file={tmp_path / split}.txt" for split in ("train", "validation")]
    words += ["--student_layers", "0", "--distilled_positions", "all", "--output_dir", str(tmp_path / "run")]
    assert main(["distill", *words, *short_run, "--num_train_epochs", "2"]) == 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run").config.num_hidden_layers == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {m["name"]: m["flips"]["count"] for m in report["models"]}["onnx"] == 0


def test_a_stream_is_distilled_to_a_distilbert(
    reviews: dict[str, str], short_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents the pretraining recipe, which no test can run, from failing on what it alone does: streaming."""
    with open(reviews["--train_file"], encoding="utf-8") as file:
        lines = [json.dumps({"text": row["sentence"]}) for row in csv.DictReader(file)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    config = {"model_type": "bert", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    words = ["--task", "masked-lm", "--dataset_name", str(tmp_path / "data"), "--streaming", "--max_eval_samples", "40"]
    words += ["--teacher_config", json.dumps(config), "--finetune_teacher", "--student_architecture", "distilbert"]
    words += [*short_run, "--output_dir", str(tmp_path / "run")]
    assert main(["distill", *words]) == 2
    assert "a stream has no epochs: give --max_steps" in capsys.readouterr().err
    assert main(["distill", *words, "--max_steps", "3", "--dataloader_num_workers", "1"]) == 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run").config.model_type == "distilbert"
