"""Inputs of linear layers whose channels differ in size, evened out in a file: SmoothQuant (arXiv:2211.10438)."""

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from prunelle.compression.quantization.smoothing import ROWS, channel_divisors
from prunelle.export.calibration import tensors_within
from prunelle.export.runner import Batch

Array = NDArray[np.float32]


def smooth(proto: ModelProto, names: Collection[str], batches: Sequence[Batch]) -> list[str]:
    """Divides channels of products' inputs by numbers that their weights are multiplied by, in place.

    They are those of `channel_divisors`, put in as a node that multiplies. The preceding norm cannot take them in as it
    does in the paper: where norms follow the sums, as in BERT, sums read it too.

    Args:
        proto: float32; computes the same afterwards, but for float rounding.
        names: of `MatMul` nodes with a stored matrix.
        batches: inputs as `activation_ranges` takes them.

    Returns:
        The inputs that are smoothed, tensors of the model.
    """
    products: dict[str, list[NodeProto]] = {}
    for node in proto.graph.node:
        if node.name in names:
            products.setdefault(node.input[0], []).append(node)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    sources = [source for source, nodes in products.items() if not _shares_weights(proto, nodes)]
    smoothed = []
    for source, (rows, low, high) in zip(sources, _seen(proto, sources, batches), strict=True):
        matrices = [numpy_helper.to_array(weights[node.input[1]]) for node in products[source]]
        matrix = np.concatenate(matrices, axis=1).T
        divisors = channel_divisors(*(torch.tensor(array) for array in (rows, low, high, matrix)))
        if divisors is not None:
            smoothed.append(source)
            _divide(proto, products[source], divisors.numpy())
    return smoothed


def smooth_as_trained(proto: ModelProto, linear: Mapping[str, str], divisors: Mapping[str, Sequence[float]]) -> None:
    """Divides the same channels as `Quantization` did in training, in place.

    Args:
        proto: as `smooth` takes it.
        linear: by the name of a `MatMul` node, the module whose product it is.
        divisors: as in a `QuantizationPlan`.
    """
    products: dict[tuple[str, tuple[float, ...]], list[NodeProto]] = {}
    for node in proto.graph.node:
        if linear.get(node.name) in divisors:
            products.setdefault((node.input[0], tuple(divisors[linear[node.name]])), []).append(node)
    for (_, chosen), nodes in products.items():
        _divide(proto, nodes, np.array(chosen, np.float32))


def _divide(proto: ModelProto, nodes: Sequence[NodeProto], divisors: Array) -> None:
    """Has products of one input read its channels divided, and multiplies their weights."""
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    source, name = nodes[0].input[0], f"{nodes[0].name}_smoothing"
    for node in nodes:
        tensor = weights[node.input[1]]
        matrix = numpy_helper.to_array(tensor) * divisors[:, None]
        tensor.CopyFrom(numpy_helper.from_array(matrix, tensor.name))
        node.input[0] = f"{name}_divided"
    proto.graph.initializer.append(numpy_helper.from_array(1 / divisors, f"{name}_factors"))
    multiplication = helper.make_node("Mul", [source, f"{name}_factors"], [f"{name}_divided"], name)
    proto.graph.node.insert(list(proto.graph.node).index(nodes[0]), multiplication)


def _shares_weights(proto: ModelProto, nodes: Sequence[NodeProto]) -> bool:
    """Whether something else reads one of their matrices, such as a layer that is used several times."""
    matrices = {node.input[1] for node in nodes}
    return sum(name in matrices for node in proto.graph.node for name in node.input) > len(nodes)


def _seen(proto: ModelProto, sources: Sequence[str], batches: Sequence[Batch]) -> Iterator[tuple[Array, Array, Array]]:
    """Of each tensor a sample of its rows (rows, channels), and the lowest and highest value of each channel."""
    draw = random.Random(0)
    taken = math.ceil(ROWS / max(len(batches), 1))
    samples: list[list[Array]] = [[] for _ in sources]
    ends: list[tuple[Array, Array]] = []
    for tensors in tensors_within(proto, sources, batches):
        matrices = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
        found = [(matrix.min(0), matrix.max(0)) for matrix in matrices]
        ends = [
            (np.minimum(low, lower), np.maximum(high, higher))
            for (low, high), (lower, higher) in zip(ends or found, found, strict=True)
        ]
        for sample, matrix in zip(samples, matrices, strict=True):
            sample.append(matrix[draw.sample(range(len(matrix)), min(taken, len(matrix)))])
    for sample, (low, high) in zip(samples, ends, strict=True):
        yield np.concatenate(sample), low, high
