"""Several labels a text, and numbers: distilled, exported, compared and pruned like classes."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import BAD, FILLER, GOOD, TEACHER_CONFIG
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prunelle.cli import main
from prunelle.errors import InputError
from prunelle.export.footprint import Footprint
from prunelle.scripts import _closing
from prunelle.tasks import TASKS, DataArguments
from prunelle.trainers.ensemble import Ensemble

MULTI_LABEL, REGRESSION = "multi_label_classification", "regression"
METRICS = {MULTI_LABEL: "average_precision", REGRESSION: "pearson"}


def write_texts(path: Path, problem: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Which kinds of words are there; how many more good ones than bad."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        good, bad = draw.choices(GOOD, k=draw.randint(0, 2)), draw.choices(BAD, k=draw.randint(0, 2))
        words = [*draw.choices(FILLER, k=6), *good, *bad]
        draw.shuffle(words)
        labels = [name for name, found in {"good": good, "bad": bad, "dog": "dog" in words}.items() if found]
        label = labels if problem == MULTI_LABEL else (len(good) - len(bad)) / 2
        rows.append({"text": " ".join(words), "label": label})
    path.write_text("\n".join(map(json.dumps, rows)))
    return rows


@pytest.mark.parametrize("problem", [MULTI_LABEL, REGRESSION])
def test_a_problem_from_end_to_end(
    problem: str,
    tmp_path: Path,
    short_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prevents a softmax over labels that do not exclude each other, numbers taken for classes, and a report whose
    figures the published checkpoint does not reach."""
    monkeypatch.setattr("prunelle.export.comparison.measure_footprint", lambda *_, **__: Footprint(0.0, 0))
    quick = partial(_closing.export_and_report, latency_seconds=0.1, shapes=["1x8"])
    monkeypatch.setattr(_closing, "export_and_report", quick)
    for seed, (split, count) in enumerate({"train": 256, "validation": 48, "test": 40}.items()):
        rows = write_texts(tmp_path / f"{split}.jsonl", problem, count, seed)
    task = ["--problem_type", problem]
    data = [*task, *(f"--{split}_file={tmp_path / split}.jsonl" for split in ("train", "validation", "test"))]
    run, teacher = tmp_path / "run", str(tmp_path / "run-teacher")
    config = {**TEACHER_CONFIG, "initializer_range": 0.1}  # narrow layers want a wider start
    words = ["--teacher_config", json.dumps(config), "--finetune_teacher", "--student_layers", "0,3"]
    words += ["--learning_rate", "3e-3", "--num_train_epochs", "4", "--output_dir", str(run), *short_run]
    words += ["--teacher_num_train_epochs", "10", "--per_device_train_batch_size", "16"]
    assert main(["distill", *data, *words]) == 0

    by_name = {model["name"]: model for model in json.loads((run / "report.json").read_text())["models"]}
    for name in ("teacher", "student", "onnx-int8"):
        assert by_name[name]["metrics"][METRICS[problem]] > 0.8, name
    assert by_name["onnx"]["flips"] == {"count": 0, "total": len(rows)}
    tokenizer = AutoTokenizer.from_pretrained(run)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    student, taught = (AutoModelForSequenceClassification.from_pretrained(f).double().eval() for f in (run, teacher))
    with torch.no_grad():
        s, t = student(**inputs).logits, taught(**inputs).logits
    assert student.config.problem_type == problem
    if problem == MULTI_LABEL:
        asked = torch.tensor([[int(student.config.id2label[c] in row["label"]) for c in range(3)] for row in rows])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(s, asked.double())
    else:
        loss = (s[:, 0] - torch.tensor([row["label"] for row in rows])).square().mean()
    assert by_name["student"]["metrics"]["loss"] == pytest.approx(float(loss), rel=1e-4)

    # What the student learns of its teacher, by hand, on the test data as validation data.
    said = ["--teacher_name_or_path", teacher, "--student_name_or_path", str(run), "--learning_rate", "0"]
    said += ["--max_steps", "1", "--temperature", "3", "--output_dir", str(tmp_path / "said"), *short_run]
    files = [f"--train_file={tmp_path}/train.jsonl", f"--validation_file={tmp_path}/test.jsonl"]
    assert main(["distill", *task, *files, *said]) == 0
    log = json.loads((tmp_path / "said" / "compression.json").read_text())["training"]
    (measured,) = [entry["eval_loss_soft_target"] for entry in log if "eval_loss_soft_target" in entry]
    if problem == MULTI_LABEL:
        p, q = (t / 3).sigmoid(), (s / 3).sigmoid()
        expected = 9 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    else:
        expected = (s - t).square().mean()
    assert measured == pytest.approx(float(expected), rel=1e-4)

    # Compared with a model that says the opposite, exported, and pruned.
    student.float().classifier.weight.data.neg_()
    student.save_pretrained(tmp_path / "opposite")
    tokenizer.save_pretrained(tmp_path / "opposite")
    test = [f"--test_file={tmp_path}/test.jsonl", "--max_seq_length", "24", "--latency_seconds", "0.1"]
    models = ["--reference", str(run), "--candidates", str(run / "onnx" / "model.onnx"), str(tmp_path / "opposite")]
    assert main(["compare", *task, *test, *models, "--shapes", "1x8", "--output_dir", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["models"][1]["flips"]["examples"] == []
    for flip in (changed := report["models"][2]["flips"]["examples"]):
        row = rows[flip["example"] - 1]
        assert flip["text"] == row["text"]
        if problem == REGRESSION:
            assert float(flip["label"]) == row["label"]
        else:
            assert sorted(flip["label"].split(", ")) == (sorted(row["label"]) or ["(none)"])
    assert len(changed) > 20
    assert "errors differ at 5 %: the candidate's are higher" in capsys.readouterr().out
    files = ["--model_name_or_path", str(run), "--variants", "fp32", "--output_dir", str(tmp_path / "files")]
    assert main(["export", *test, *files]) == 0
    assert f"0 of {len(rows)}" in capsys.readouterr().out
    pruned = ["--model_name_or_path", str(run), "--density", "0.5", "--max_steps", "4", *short_run]
    assert main(["prune", *data, *pruned, "--output_dir", str(tmp_path / "pruned")]) == 0

    # Of another problem.
    other = REGRESSION if problem == MULTI_LABEL else MULTI_LABEL
    write_texts(tmp_path / "other.jsonl", other, 8, 0)
    arguments = DataArguments(problem_type=other, train_file=f"{tmp_path}/other.jsonl")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"was trained for {problem}: give --problem_type"):
        TASKS["text-classification"](arguments, 0).adopt(student.config, "it")


def test_several_teachers_of_several_labels() -> None:
    """Prevents a mean over labels that do not exclude each other, as if they were classes that do."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(**sizes, intermediate_size=8, initializer_range=1.0, num_labels=3, problem_type=MULTI_LABEL)
    teachers = [BertForSequenceClassification(config).double().eval() for _ in range(2)]
    words = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        mean = Ensemble(teachers, temperature=2.0)(words).logits
        apart = [(teacher(words).logits / 2).sigmoid() for teacher in teachers]
    torch.testing.assert_close((mean / 2).sigmoid(), (apart[0] + apart[1]) / 2)


@pytest.mark.parametrize(
    ("problem", "labels", "message"),
    [
        (MULTI_LABEL, ["a", "b"], r"column 'label' holds no lists"),
        (MULTI_LABEL, [[0, 1, 0], [1]], r"example 1: column 'label' names a label twice"),
        (MULTI_LABEL, [["a"], ["a"]], r"holds one label only"),
        (REGRESSION, ["a", "b"], r"example 1: column 'label' holds no number but 'a'"),
        (REGRESSION, [1.0, 1.0], r"holds one number only"),
        (REGRESSION, [1.0, -100.0], r"example 2: -100 stands for no label"),
        ("single_label_classification", [["a"], ["b"]], r"give --problem_type multi_label_classification"),
    ],
)
def test_labels_of_another_kind(problem: Any, labels: list[Any], message: str, tmp_path: Path) -> None:
    """Prevents hours of training on labels that mean something else."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": "a text", "label": label}) for label in labels))
    arguments = DataArguments(problem_type=problem, train_file=str(file), validation_file=str(file))
    with pytest.raises(InputError, match=message):
        TASKS["text-classification"](arguments, 0)


def test_figures_by_hand() -> None:
    """Metrics against sums on paper; ties must not depend on the order of the examples."""
    from prunelle.tasks import MultiLabelClassification, TextRegression

    scores = np.array([[2.0, -1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, 1.0, -2.0], [0.5, -3.0, -3.0]])
    true = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]])
    found = MultiLabelClassification.compute_metrics(scores, true)
    # Label 0: 2 hits of 3 predicted and 3 true; label 1: 1 hit of 2 predicted and 1 true; label 2: never.
    assert found["f1_micro"] == pytest.approx(2 * 3 / 9)
    assert found["f1_macro"] == pytest.approx((2 * 2 / 6 + 2 * 1 / 3) / 2)
    # Label 0 is found in places 1, 3 and 4; label 1 in the first two, which tie.
    assert found["average_precision"] == pytest.approx(((1 + 2 / 3 + 3 / 4) / 3 + 1 / 2) / 2)
    assert MultiLabelClassification.compute_metrics(scores[::-1], true[::-1]) == pytest.approx(found)

    figures = TextRegression.compute_metrics(np.array([1.0, 2.0, 2.0, 9.0]), np.array([0.0, 1.0, 2.0, 3.0]))
    assert figures["mse"] == pytest.approx((1 + 1 + 0 + 36) / 4)
    assert figures["pearson"] == pytest.approx(np.corrcoef([1, 2, 2, 9], [0, 1, 2, 3])[0, 1])
    assert figures["spearman"] == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
    assert TextRegression.compute_metrics(np.array([1.0, 1.0]), np.array([0.0, 1.0]))["pearson"] == 0.0
