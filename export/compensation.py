"""Matrices of a file, changed so that their products lose little by rounding: GPTQ (arXiv:2210.17323)."""

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from prunelle.compression.quantization.compensation import compensated
from prunelle.compression.quantization.weights import INT8_END
from prunelle.export.calibration import tensors_within
from prunelle.export.runner import Batch

Array = NDArray[np.float32]


def compensate(proto: ModelProto, names: Collection[str], batches: Sequence[Batch]) -> dict[str, Array]:
    """Changes matrices as `compensated` does, in place. Those that something else reads too stay as they are.

    Args:
        proto: float32.
        names: of `MatMul` nodes with a stored matrix that is to be rounded.
        batches: inputs as `activation_ranges` takes them.

    Returns:
        By name, the matrices as they were: (inputs, outputs).
    """
    readers = Counter(name for node in proto.graph.node for name in node.input)
    products = [node for node in proto.graph.node if node.name in names and readers[node.input[1]] == 1]
    sources = list(dict.fromkeys(node.input[0] for node in products))
    grams: dict[str, Array] = {}
    for tensors in tensors_within(proto, sources, batches):
        for source, tensor in zip(sources, tensors, strict=True):
            rows = tensor.reshape(-1, tensor.shape[-1])
            grams[source] = grams.get(source, 0) + rows.T @ rows
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    before = {node.input[1]: numpy_helper.to_array(stored[node.input[1]]) for node in products}
    for node in products:
        weight, gram = torch.from_numpy(before[node.input[1]].T.copy()), torch.from_numpy(grams[node.input[0]])
        matrix = compensated(weight, gram, INT8_END).T.contiguous().numpy()
        stored[node.input[1]].CopyFrom(numpy_helper.from_array(matrix, node.input[1]))
    return before
