"""What rounding shifts on average, taken back by the biases (arXiv:1906.04721, section 4.2)."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from prunelle.export.calibration import tensors_within
from prunelle.export.qdq import Grid, rounded_input, rounded_matrix
from prunelle.export.runner import Batch


def correct_biases(
    proto: ModelProto,
    grids: Mapping[str, Grid],
    names: Collection[str],
    batches: Sequence[Batch],
    matrices: Mapping[str, NDArray[np.float32]],
) -> None:
    """Adds to the bias after each product what the product loses on average by rounding, in place.

    Products without a stored bias of their own stay as they are.

    Args:
        proto: float32.
        grids: by the name of a tensor that products read, the scale and the zero point that it is to be rounded to.
        names: of the products, `MatMul` nodes with a stored matrix that is to be rounded too.
        batches: inputs as `activation_ranges` takes them. The average is over all of their tokens.
        matrices: by name, those that were others before `compensate`.
    """
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    biases = _biases(proto, names)
    products = [node for node in proto.graph.node if node.name in names and node.output[0] in biases]
    sources = list(dict.fromkeys(node.input[0] for node in products))
    sums = dict.fromkeys(sources, (np.float64(0), np.float64(0)))
    rows = dict.fromkeys(sources, 0)
    for tensors in tensors_within(proto, sources, batches):
        for source, tensor in zip(sources, tensors, strict=True):
            matrix = tensor.reshape(-1, tensor.shape[-1])
            exact, rounded = sums[source]
            sums[source] = exact + matrix.sum(0), rounded + rounded_input(matrix, grids[source]).sum(0)
            rows[source] += len(matrix)
    for node in products:
        bias = stored[biases[node.output[0]]]
        name = node.input[1]
        matrix = numpy_helper.to_array(stored[name])
        exact, rounded = sums[node.input[0]]
        lost = (exact @ matrices.get(name, matrix) - rounded @ rounded_matrix(matrix)) / rows[node.input[0]]
        bias.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(bias) + lost).astype(np.float32), bias.name))


def _biases(proto: ModelProto, names: Collection[str]) -> dict[str, str]:
    """By what a product puts out, the stored vector that is added to it and to nothing else."""
    readers = Counter(name for node in proto.graph.node for name in node.input)
    put_out = {node.output[0] for node in proto.graph.node if node.name in names}
    vectors = {tensor.name for tensor in proto.graph.initializer if len(tensor.dims) == 1 and readers[tensor.name] == 1}
    return {
        product: bias
        for node in proto.graph.node
        if node.op_type in ("Add", "Sum")
        for product in put_out.intersection(node.input)
        for bias in vectors.intersection(node.input)
        if readers[product] == 1
    }
