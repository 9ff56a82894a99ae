"""What a model was trained with and what its file computes, layer by layer on equal inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedModel

from prunelle.compression import bake
from prunelle.compression.quantization import Quantization, QuantizationPlan
from prunelle.export import ExportError, export_variants, quantize_dynamic, quantize_int4, quantize_static
from prunelle.export.origin import module_of
from prunelle.export.variants import variant_of

BATCH = {
    "input_ids": torch.randint(5, 300, (3, 12), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(3, 12, dtype=torch.int64),
    "token_type_ids": torch.zeros(3, 12, dtype=torch.int64),
}
POSITIONS = torch.arange(12)[None]
LOOKED_UP = {
    "word_embeddings": BATCH["input_ids"],
    "wte": BATCH["input_ids"],
    "token_type_embeddings": BATCH["token_type_ids"],
    "position_embeddings": POSITIONS,
    "wpe": POSITIONS,
}


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 64, "n_positions": 48, "vocab_size": 300}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=3, initializer_range=0.2, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def computed(file: Path, names: list[str]) -> dict[str, Tensor]:
    """What a file computes on the way."""
    shown = onnx.load(file)
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in [output.name for output in shown.graph.output]:
            shown.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    taken = {tensor.name: BATCH[tensor.name].numpy() for tensor in session.get_inputs()}
    return {name: torch.from_numpy(tensor) for name, tensor in zip(names, session.run(names, taken), strict=True)}


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic, whole tables": ("bert", {"scheme": "int8-dynamic", "embeddings": "tensor"}),
    "static, learned": ("gpt2", {"scheme": "int8-static", "ranges": "learned"}),
    "static, channels of unlike size": ("uneven bert", {"scheme": "int8-static", "embeddings": "none"}),
    "4 bits": ("gpt2", {"scheme": "int4-weight", "patterns": ["*"]}),
    "4 bits, symmetric": ("bert", {"scheme": "int4-weight", "block_size": 64, "symmetric": True}),
}


@pytest.mark.parametrize(("architecture", "options"), SCHEMES.values(), ids=SCHEMES)
def test_every_module_agrees_with_the_file(
    architecture: str, options: dict[str, Any], make_bert: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Prevents training for another rounding than the one that will be deployed, rounding twice, and channels that are
    divided in training alone.
    """
    model = gpt2() if architecture == "gpt2" else make_bert()
    if architecture == "uneven bert":
        for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
            norm.weight.data[3] *= 50
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    method = Quantization(**options)
    method.attach(model)
    method.calibrate(model, lambda samples, after_batch: [model(**BATCH) for _ in range(2)] and None)
    with torch.no_grad():
        for static in method._static().values():
            if static.learned:
                static.scale.mul_(0.7)  # as learning leaves it: some values are clipped
    method.step(0.0)
    plan, kept = method.plan(), {}
    assert plan.divisors or architecture != "uneven bert"
    for name in [*plan.linear, *plan.tables]:
        module = model.get_submodule(name).eval()
        kept[name] = module, getattr(module, "input_quantizer", None), module.weight.detach()
    bake(model)
    fp32, quantized = export_variants(model, tmp_path, ("fp32", variant_of(plan)), plan=plan).values()

    nodes = {
        module_of(node): node for node in onnx.load(fp32).graph.node if node.op_type in ("MatMul", "Gemm", "Gather")
    }
    outputs = [nodes[name].output[0] for name in kept]
    tensors = computed(quantized, [*(nodes[name].input[0] for name in plan.linear), *outputs])
    for name, (module, quantizer, weight) in kept.items():
        assert not torch.equal(weight, original[f"{name}.weight"]), name
        found = tensors[nodes[name].output[0]]
        if name in plan.tables:
            words = {"word_embeddings": "input_ids", "wte": "input_ids", "token_type_embeddings": "token_type_ids"}
            simulated = functional.embedding(
                BATCH.get(words.get(name.split(".")[-1], ""), torch.arange(12)[None]), weight
            )
            assert relative_difference(found, simulated) < 1e-5, name
            continue
        inputs = tensors[nodes[name].input[0]]
        with torch.no_grad():
            rounded = inputs if quantizer is None else quantizer(inputs)
        simulated = rounded @ (weight.T if isinstance(module, torch.nn.Linear) else weight)
        # A MatMul's bias is added by the next node, a Gemm's within.
        with_bias = simulated if module.bias is None else simulated + module.bias.detach()
        assert min(relative_difference(found, each) for each in (simulated, with_bias)) < 1e-5, name


PLANS = {
    "int8-dynamic": (quantize_dynamic, "MatMulInteger"),
    "int8-static": (quantize_static, "QuantizeLinear"),
    "int4-weight": (quantize_int4, "MatMulNBits"),
}


@pytest.mark.parametrize("scheme", PLANS)
def test_only_what_was_trained_for_it_is_quantized(classifier: Any, tmp_path: Path, scheme: Any) -> None:
    """Prevents layers left out for their sensitivity from being rounded by the export after all."""
    attention = "bert.encoder.layer.0.attention"
    chosen = [f"{attention}.self.query", f"{attention}.output.dense", "classifier"]
    plan = QuantizationPlan(scheme, chosen, embeddings="none", inputs=dict.fromkeys(chosen, (0.1, 100)))
    quantize, operator = PLANS[scheme]
    graph = onnx.load(quantize(classifier.file, tmp_path / "quantized.onnx", plan=plan)).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count(operator) == 3
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert sum(node.op_type in ("MatMul", "Gemm") and node.input[1] in floats for node in graph.node) == 5
    assert "model.bert.embeddings.word_embeddings.weight" in floats


def test_a_plan_of_another_model_is_refused(classifier: Any, tmp_path: Path) -> None:
    """Prevents a float32 file that is called int8."""
    plan = QuantizationPlan("int8-dynamic", ["transformer.h.0.attn.c_attn"])
    with pytest.raises(ExportError, match="none of the 1 quantized modules is in the ONNX file"):
        quantize_dynamic(classifier.file, tmp_path / "quantized.onnx", plan=plan)
