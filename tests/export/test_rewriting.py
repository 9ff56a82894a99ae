"""Files compute what they did, by operators that onnxruntime is fast at."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prunelle.export import convert_to_fp16, quantize_dynamic, quantize_static
from prunelle.export.rewriting import merge_heads


def static(source: Path, target: Path) -> Path:
    words = torch.arange(5, 17)[None]
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words), "token_type_ids": torch.zeros_like(words)}
    return quantize_static(source, target, batches=[batch])


def run_operators(file: Path, folder: Path) -> Counter[str]:
    """What onnxruntime makes of a file before it runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("convert", [None, quantize_dynamic, static])
def test_nothing_slow_is_run(convert: Any, classifier: Any, tmp_path: Path) -> None:
    """Prevents copies around attention, and kernels that take several times as long as the nodes they stand for."""
    file = classifier.file if convert is None else convert(classifier.file, tmp_path / "converted.onnx")
    operators = run_operators(file, tmp_path)
    assert operators["Attention"] == 1
    assert operators["LayerNormalization"] == 3
    slow = {"Transpose", "Reshape", "SkipLayerNormalization"}
    # Static weights that were made a Gemm's would be converted to float32 at every run.
    assert not (slow if convert is None else slow | {"Gemm", "FusedGemm", "MatMul"}) & set(operators)


def test_a_file_for_gpus_keeps_what_is_fast_there(classifier: Any, tmp_path: Path) -> None:
    """Prevents the detour around a slow kernel for CPUs from costing GPUs their fast one."""
    graph = onnx.load(convert_to_fp16(classifier.file, tmp_path / "fp16.onnx")).graph
    assert "Sum" not in {node.op_type for node in graph.node}


def heads(turned: bool) -> ModelProto:
    """Attention of 2 heads of 4, as the exporter writes it; its queries `turned`, as by rotary positions."""
    nodes = []
    for name in "qkv":
        nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}4"]))
        nodes.append(helper.make_node("Transpose", [f"{name}4"], [f"{name}t"], perm=(0, 2, 1, 3)))
    nodes.append(helper.make_node("Neg", ["qt"], ["turned"]))
    nodes.append(helper.make_node("Attention", ["turned" if turned else "qt", "kt", "vt"], ["a"]))
    nodes.append(helper.make_node("Transpose", ["a"], ["at"], perm=(0, 2, 1, 3)))
    nodes.append(helper.make_node("Reshape", ["at", "merge"], ["y"]))
    shapes = {"split": [0, 0, 2, 4], "merge": [0, 0, 8]}
    graph = helper.make_graph(
        nodes,
        "heads",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", 8]) for name in "qkv"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", 8])],
        [numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def output(model: ModelProto) -> NDArray[np.float32]:
    inputs = np.random.default_rng(0).standard_normal((3, 2, 5, 8), dtype=np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], dict(zip("qkv", inputs, strict=True)))[0]


@pytest.mark.parametrize("turned", [False, True])
def test_heads_are_merged_where_nothing_stands_between(turned: bool) -> None:
    """Prevents rotary positions, or whatever else is done head by head, from being left out of what is computed."""
    model = heads(turned)
    expected = output(model)
    merge_heads(model)
    assert Counter(node.op_type for node in model.graph.node)["Transpose"] == (4 if turned else 0)
    np.testing.assert_allclose(output(model), expected, atol=1e-6)
