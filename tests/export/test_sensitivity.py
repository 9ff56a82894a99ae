"""An int8 file held to a limit: which modules stay in float32 for that, and what is said of it."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch

from prunelle.cli import main
from prunelle.export import ExportError, OnnxRunner, evaluate, export_variants
from prunelle.export.arguments import ExportArguments
from prunelle.export.data import Examples
from prunelle.export.sensitivity import quantize_within
from prunelle.tasks import metrics

SENSITIVE = "bert.encoder.layer.0.attention.output.dense"


def accuracy(predictions, references):
    return metrics.compute([metrics.Accuracy], predictions, references)


@pytest.fixture
def given(make_bert, tokenizer, tmp_path):
    """A model one of whose inputs has an outlier that its weights take back: nothing to float32, much to int8."""
    model = make_bert()
    attention = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        attention.self.value.weight[0] *= 1000
        attention.self.value.bias[0] *= 1000
        attention.output.dense.weight[:, 0] /= 1000
        attention.output.dense.weight[:, 1:] *= 4
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(8):
        words = torch.randint(5, 300, (32, 12), generator=generator)
        inputs = {
            "input_ids": words,
            "attention_mask": torch.ones_like(words),
            "token_type_ids": torch.zeros_like(words),
        }
        with torch.inference_mode():
            batches.append({**inputs, "labels": model(**inputs).logits.argmax(-1)})
    return SimpleNamespace(
        checkpoint=SimpleNamespace(model=model, tokenizer=tokenizer, plan=None),
        files=export_variants(model, tmp_path),
        task=SimpleNamespace(compute_metrics=accuracy),
        examples={"validation": Examples(batches)},
        arguments=lambda limit: ExportArguments(
            model_name_or_path="x", output_dir="y", max_accuracy_drop=limit, latency_seconds=0
        ),
    )


def choose(given, limit):
    return quantize_within(given.checkpoint, given.files, given.task, given.examples, given.arguments(limit), ["1x8"])


def test_the_module_that_costs_the_accuracy_is_left_out_alone(given):
    """Prevents a limit that is kept by leaving out half of the model, or that the file written does not keep."""
    everything = given.files["int8-dynamic"].read_bytes()
    assert choose(given, 100.0).modules == []
    assert given.files["int8-dynamic"].read_bytes() == everything

    choice = choose(given, 5.0)
    assert choice.modules == [SENSITIVE]
    assert choice.drop <= 5.0 < choice.drop_of_all
    runners = [OnnxRunner(given.files[name], name, parameters=0) for name in ("fp32", "int8-dynamic")]
    fp32, int8 = evaluate(runners, given.examples["validation"].batches, accuracy, reference=runners[0])
    assert 100 * (fp32.metrics["accuracy"] - int8.metrics["accuracy"]) == pytest.approx(choice.drop)
    graph = onnx.load(given.files["int8-dynamic"]).graph
    stored = {tensor.name for tensor in graph.initializer}
    left = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in stored]
    assert len(left) == 1
    assert f"1 of {choice.of} modules are left in float32 ({SENSITIVE})" in choice.to_text()
    assert "ms instead of" in choice.to_text()


def test_a_limit_that_cannot_be_kept_is_said(given):
    """Prevents a file without anything quantized that calls itself int8."""
    calls = count()
    given.task.compute_metrics = lambda predictions, references: {"accuracy": float(next(calls) == 0)}
    with pytest.raises(ExportError, match="loses more as long as one module is quantized"):
        choose(given, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test_file", "test.csv"], "--max_accuracy_drop is kept on validation data: give --validation_file"),
        ([], "--max_accuracy_drop is kept on validation data: give --validation_file"),
        (["--validation_file", "v.csv", "--variants", "int8-dynamic"], "give both in --variants"),
        (["--validation_file", "v.csv", "--max_accuracy_drop", "-1"], "-1.0 must not be negative"),
    ],
)
def test_a_limit_without_what_it_needs_is_one_line(words, message, tmp_path: Path, capsys):
    flags = ["--model_name_or_path", "x", "--max_accuracy_drop", "0.5", "--output_dir", str(tmp_path / "onnx")]
    assert main(["export", *flags, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()
