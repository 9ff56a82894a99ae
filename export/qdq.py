"""Products of 8-bit integers in the form that every runtime reads: float operators between quantized tensors (QDQ)."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from prunelle.compression.quantization.weights import INT8_END

Grid = tuple[float, int]


def uint8_grid(low: float, high: float) -> Grid:
    """The scale and the zero point of unsigned 8-bit integers between two values, widened to hold zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return scale, int(np.clip(round(-low / scale), 0, 255))


def write_qdq(proto: ModelProto, inputs: Mapping[str, Grid]) -> None:
    """Gives products with stored matrices weights of 8 bits, and rounds their inputs, in place.

    A matrix has one scale a column: its largest weight / 64. What the product gives stays float32.

    Args:
        proto: float32, its linear layers `MatMul` nodes.
        inputs: by the name of such a node, the scale and the zero point of its input.
    """
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    rounded: dict[tuple[str, Grid], str] = {}
    for node in graph.node:
        if node.name in inputs:
            source, weight = node.input
            key = source, inputs[node.name]
            if key not in rounded:
                rounded[key] = f"{source}_rounded_{len(rounded)}"
                graph.initializer.extend(_grid(rounded[key], *inputs[node.name]))
                nodes += _round(source, rounded[key])
            if weight in stored:
                tensor = stored.pop(weight)
                graph.initializer.remove(tensor)
                graph.initializer.extend(_int8(weight, numpy_helper.to_array(tensor)))
                nodes.append(_dequantize(weight, weight, axis=1))
            node.input[0] = rounded[key]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _grid(name: str, scale: float, zero: int) -> list[TensorProto]:
    return [
        numpy_helper.from_array(np.float32(scale), f"{name}_scale"),
        numpy_helper.from_array(np.uint8(zero), f"{name}_zero_point"),
    ]


def rounded_input(values: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """What is computed with in place of a product's input."""
    scale, zero = np.float32(grid[0]), grid[1]
    return (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale


def rounded_matrix(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """(inputs, outputs) what is computed with in place of it."""
    scale = _scale(matrix)
    return np.round(matrix / scale) * scale


def _scale(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """(outputs,)"""
    scale = np.abs(matrix).max(0) / np.float32(INT8_END)
    scale[scale < np.finfo(np.float32).tiny] = 1
    return scale


def _int8(name: str, matrix: NDArray[np.float32]) -> list[TensorProto]:
    scale = _scale(matrix)
    return [
        numpy_helper.from_array(np.round(matrix / scale).astype(np.int8), f"{name}_quantized"),
        numpy_helper.from_array(scale, f"{name}_scale"),
        numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{name}_zero_point"),
    ]


def _round(source: str, target: str) -> list[NodeProto]:
    grid = [f"{target}_scale", f"{target}_zero_point"]
    quantize = helper.make_node("QuantizeLinear", [source, *grid], [f"{target}_quantized"], f"{target}_quantize")
    return [quantize, _dequantize(target, target)]


def _dequantize(name: str, output: str, **axis: int) -> NodeProto:
    tensors = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
    return helper.make_node("DequantizeLinear", tensors, [output], f"{name}_dequantize", **axis)
