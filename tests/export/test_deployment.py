import json

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

from prunelle.export import FP32_FILE, INT8_FILE, export_and_report


def accuracy(predictions, references):
    return {"accuracy": float((predictions == references).mean())}


def batches_for(model, label_of):
    """Two uneven batches, labelled by `label_of` the model's logits."""
    generator = torch.Generator().manual_seed(0)
    for rows in (8, 3):
        words = torch.randint(5, 300, (rows, 12), generator=generator)
        batch = {
            "input_ids": words,
            "attention_mask": torch.ones_like(words),
            "token_type_ids": torch.zeros_like(words),
        }
        with torch.inference_mode():
            yield {**batch, "labels": label_of(model(**batch).logits)}


def test_classifier_with_a_teacher(make_bert, tokenizer, tmp_path):
    """The whole end of the road: files that load, rows in order, figures relative to the right model."""
    teacher, student = make_bert(layers=2), make_bert()
    student.save_pretrained(tmp_path)
    report = export_and_report(
        student,
        tokenizer,
        tmp_path,
        batches=list(batches_for(student, lambda logits: logits.argmax(-1))),
        compute_metrics=accuracy,
        teacher=teacher,
        shapes=["1x8", "2x64"],
        latency_seconds=0.5,
    )
    assert (tmp_path / FP32_FILE).is_file()
    assert (tmp_path / INT8_FILE).is_file()
    assert (tmp_path / INT8_FILE).stat().st_size < (tmp_path / FP32_FILE).stat().st_size
    content = json.loads((tmp_path / "report.json").read_text())
    assert content == report.to_dict()
    rows = {row["name"]: row for row in content["models"]}
    assert list(rows) == ["teacher", "student", "onnx", "onnx-int8"]
    assert [row["format"] for row in rows.values()] == ["torch", "torch", "onnx", "onnx-int8"]
    assert content["reference"] == "student"
    assert rows["student"]["metrics"]["accuracy"] == rows["onnx"]["metrics"]["accuracy"] == 1.0
    assert rows["student"]["flips"] == rows["onnx"]["flips"] == {"count": 0, "total": 11}
    assert rows["student"]["max_abs_logit_difference"] == 0.0
    assert 0.0 < rows["onnx"]["max_abs_logit_difference"] < 1e-4 < rows["onnx-int8"]["max_abs_logit_difference"]
    assert rows["teacher"]["speedup"] == {"1x8": 1.0, "2x48": 1.0}  # cut to what the models can take
    assert rows["student"]["parameters"] == rows["onnx-int8"]["parameters"] < rows["teacher"]["parameters"]
    assert rows["student"]["size_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert rows["teacher"]["size_bytes"] == pytest.approx(4 * rows["teacher"]["parameters"], rel=0.05)


def test_language_model_without_a_teacher(make_bert, tokenizer, tmp_path):
    """Without a teacher the student is the base of the speed-ups; a wrecked metric is named."""
    student = make_bert(BertForMaskedLM)

    def labels(logits):
        return logits.argmax(-1).where(torch.arange(12) % 5 == 0, torch.tensor(-100))

    def only_the_first_model_is_right(predictions, references, calls=[]):  # noqa: B006
        calls.append(predictions)
        return {"accuracy": 1.0 if len(calls) == 1 else 0.5}

    report = export_and_report(
        student,
        tokenizer,
        tmp_path,
        batches=list(batches_for(student, labels)),
        compute_metrics=only_the_first_model_is_right,
        shapes=["1x8"],
        latency_seconds=0.0,
    )
    assert [row.name for row in report.models] == ["student", "onnx", "onnx-int8"]
    assert report.models[0].speedup == {"1x8": 1.0}
    assert report.models[0].total == 33
    assert report.models[0].size_bytes < 1.1 * sum(4 * p.numel() for p in student.parameters())
    assert "onnx-int8 loses 50.0 points of accuracy" in report.to_text()
    assert np.isfinite(report.models[2].metrics["loss"])
