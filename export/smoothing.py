"""Inputs of linear layers whose channels differ in size, evened out before all of a tensor shares one scale.

Some channels of a transformer's activations are many times as large as the others, which one scale for all then leaves
with few steps. Dividing each channel by a number and multiplying the weights that read it by the same one changes
nothing but what is lost by rounding: SmoothQuant (arXiv:2211.10438).
"""

import math
import random
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from prunelle.export.calibration import tensors_within
from prunelle.export.qdq import rounded_input, rounded_matrix, uint8_grid
from prunelle.export.runner import Batch

Array = NDArray[np.float32]

# How the size of a channel is shared between input and weights: all left to the weights at 1.
EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WORTH = 0.5  # the share of the error that may be left where a multiplication is put in for it
ROWS = 1024  # of each input, on which the error is measured
SMALLEST = 1e-3  # what channels that hardly ever differ from zero are taken for, of the largest


def smooth(proto: ModelProto, names: Collection[str], batches: Sequence[Batch]) -> list[str]:
    """Divides channels of products' inputs by numbers that their weights are multiplied by, in place.

    The numbers are `max|x|^a / max|w|^(1-a)` of each channel, as in SmoothQuant; `a` is chosen for each input by the
    squared error that rounding leaves in its products. They are put in, as a node that multiplies, where they at least
    halve that error. The preceding norm cannot take them in as it does in the paper: where norms follow the sums, as in
    BERT, sums read it too.

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
        nodes = products[source]
        matrices = [numpy_helper.to_array(weights[node.input[1]]) for node in nodes]
        divisors = _divisors(rows, low, high, np.concatenate(matrices, axis=1))
        if divisors is None:
            continue
        smoothed.append(source)
        for node, matrix in zip(nodes, matrices, strict=True):
            name = node.input[1]
            weights[name].CopyFrom(numpy_helper.from_array(matrix * divisors[:, None], name))
            node.input[0] = f"{source}_smooth"
        proto.graph.initializer.append(numpy_helper.from_array(1 / divisors, f"{source}_factors"))
        multiplication = helper.make_node(
            "Mul", [source, f"{source}_factors"], [f"{source}_smooth"], f"{source}_smoothing"
        )
        proto.graph.node.insert(list(proto.graph.node).index(nodes[0]), multiplication)
    return smoothed


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


def _divisors(rows: Array, low: Array, high: Array, matrix: Array) -> Array | None:
    """(channels,) what to divide the input's channels by, None where it is not worth while."""
    size, weight = _floored(np.maximum(-low, high)), _floored(np.abs(matrix).max(1))
    candidates = [size**exponent / weight ** (1 - exponent) for exponent in EXPONENTS]
    exact = rows @ matrix
    before, *errors = [
        _error(rows, low, high, matrix, divisors, exact) for divisors in (np.ones_like(size), *candidates)
    ]
    least = int(np.argmin(errors))
    return candidates[least] if errors[least] < WORTH * before else None


def _floored(sizes: Array) -> Array:
    return np.maximum(sizes, SMALLEST * sizes.max() or 1)


def _error(rows: Array, low: Array, high: Array, matrix: Array, divisors: Array, exact: Array) -> float:
    """Mean squared, of the products of rounded rows with the rounded matrix."""
    grid = uint8_grid(float((low / divisors).min()), float((high / divisors).max()))
    rounded = rounded_input(rows / divisors, grid)
    return float(np.square(rounded @ rounded_matrix(matrix * divisors[:, None]) - exact).mean())
