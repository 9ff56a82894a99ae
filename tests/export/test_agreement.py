"""What a model was trained with and what its file computes, layer by layer on equal inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedModel

from prunelle.compression import bake
from prunelle.compression.quantization import Quantization
from prunelle.export import ExportError, export_variants
from prunelle.export.quantization import _module

BATCH = {
    "input_ids": torch.randint(5, 300, (3, 12), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(3, 12, dtype=torch.int64),
    "token_type_ids": torch.zeros(3, 12, dtype=torch.int64),
}


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 64, "n_positions": 48, "vocab_size": 300}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=3, initializer_range=0.2, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=["bert", "gpt2"])
def model(request: pytest.FixtureRequest, make_bert: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_bert() if request.param == "bert" else gpt2()


def traced(file: Path, modules: list[str]) -> dict[str, tuple[str, str]]:
    """Where in a float32 file a module's input and output are."""
    found = {}
    for node in onnx.load(file).graph.node:
        if (name := _module(node)) in modules and node.op_type in ("MatMul", "Gemm", "Gather"):
            found[name] = (node.input[0], node.output[0])
    assert set(found) == set(modules)
    return found


def computed(file: Path, names: list[str]) -> dict[str, np.ndarray]:
    """What a file computes on the way."""
    shown = onnx.load(file)
    for name in dict.fromkeys(names):
        if name not in [output.name for output in shown.graph.output]:
            shown.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    taken = {tensor.name: BATCH[tensor.name].numpy() for tensor in session.get_inputs()}
    return dict(zip(names, session.run(names, taken), strict=True))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_every_linear_module_agrees_with_the_file(model: PreTrainedModel, tmp_path: Path) -> None:
    """Prevents training for another rounding than the one that will be deployed."""
    method = Quantization()
    method.attach(model)
    modules = {name: model.get_submodule(name) for name in method.plan.linear}
    kept: dict[str, Any] = {name: (module.input_quantizer, module.weight.detach()) for name, module in modules.items()}
    bake(model)
    files = export_variants(model, tmp_path, plan=method.plan)
    places = traced(files["fp32"], method.plan.linear)
    tensors = computed(files["int8-dynamic"], [name for pair in places.values() for name in pair])
    for name, (source, target) in places.items():
        quantizer, weight = kept[name]
        inputs, outputs = (torch.from_numpy(tensors[each]) for each in (source, target))
        simulated = quantizer(inputs) @ (weight.T if isinstance(modules[name], torch.nn.Linear) else weight)
        # A MatMul's bias is added by the next node, a Gemm's within.
        bias = modules[name].bias
        with_bias = simulated if bias is None else simulated + bias.detach()
        assert min(relative_difference(outputs, each) for each in (simulated, with_bias)) < 1e-5, name


def test_every_table_agrees_with_the_file(model: PreTrainedModel, tmp_path: Path) -> None:
    """Prevents embeddings that are rounded once more, or otherwise, when they are exported."""
    method = Quantization()
    method.attach(model)
    tables = {name: model.get_submodule(name).weight.detach() for name in method.plan.embeddings}
    bake(model)
    files = export_variants(model, tmp_path, plan=method.plan)
    nodes = {_module(node): node for node in onnx.load(files["fp32"]).graph.node if node.op_type == "Gather"}
    tensors = computed(files["int8-dynamic"], [nodes[name].output[0] for name in tables])
    words = {"word_embeddings": "input_ids", "wte": "input_ids", "token_type_embeddings": "token_type_ids"}
    for name, table in tables.items():
        places = BATCH.get(words.get(name.split(".")[-1], ""), torch.arange(12)[None])
        expected = functional.embedding(places, table)
        found = torch.from_numpy(tensors[nodes[name].output[0]])
        assert relative_difference(found, expected) < 1e-5, name


def test_only_what_was_trained_for_it_is_quantized(make_bert: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """Prevents layers left out for their sensitivity from being rounded by the export after all."""
    model = make_bert()
    method = Quantization(patterns=["*.attention.*"], excluded=["*.value"], embeddings=False)
    method.attach(model)
    bake(model)
    files = export_variants(model, tmp_path, plan=method.plan)
    operators = [node.op_type for node in onnx.load(files["int8-dynamic"]).graph.node]
    assert operators.count("MatMulInteger") == 3
    assert operators.count("MatMul") + operators.count("Gemm") == 5
    (table,) = [t for t in onnx.load(files["int8-dynamic"]).graph.initializer if "word_embeddings" in t.name]
    assert table.data_type == onnx.TensorProto.FLOAT


def test_a_plan_of_another_model_is_refused(make_bert: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """Prevents a float32 file that is called int8."""
    method = Quantization()
    method.attach(gpt2())
    with pytest.raises(ExportError, match="none of the 5 quantized modules is in the ONNX file"):
        export_variants(make_bert(), tmp_path, plan=method.plan)
