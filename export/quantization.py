"""A float32 ONNX file to an int8 one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization import quantize_dynamic as onnxruntime_quantize_dynamic

from prunelle.export.files import published_when_done

# Left to choose, onnxruntime also quantizes Attention, into a node that it cannot load.
QUANTIZED_OPERATORS = ["MatMul", "Gemm", "Gather"]


def quantize_dynamic(fp32_file: str | Path, output_file: str | Path) -> Path:
    """Writes the int8 version of a file of `export_onnx`, and returns its path.

    Weights of linear layers become 8-bit integers, one scale for each output channel; embeddings too,
    one scale for each table. Inputs of linear layers are quantized to 8 bits while the model runs, over
    the range that a batch turns out to have. No calibration data is needed. Everything else, attention
    among it, stays in float32.
    """
    output_file = Path(output_file)
    proto = onnx.load(fp32_file)
    _untie_weights(proto)
    # The exporter's shapes and those that the quantizer infers name free dimensions differently, which
    # the quantizer takes for a contradiction.
    del proto.graph.value_info[:]
    with published_when_done(output_file) as unfinished, _silence():
        onnxruntime_quantize_dynamic(
            proto,
            unfinished,
            op_types_to_quantize=QUANTIZED_OPERATORS,
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        onnx.save(_with_unsigned_weights(onnx.load(unfinished)), unfinished)
        onnx.checker.check_model(unfinished, full_check=True)
    return output_file


def _untie_weights(proto: ModelProto) -> None:
    """Stores transposed weights as such: the quantizer takes only products with a stored matrix."""
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "Transpose" and node.input[0] in weights:
            (permutation,) = (list(attribute.ints) for attribute in node.attribute)
            matrix = numpy_helper.to_array(weights[node.input[0]]).transpose(permutation)
            graph.initializer.append(numpy_helper.from_array(matrix.copy(), node.output[0]))
            graph.node.remove(node)


def _with_unsigned_weights(proto: ModelProto) -> ModelProto:
    """Moves the stored integers of products, and their zero points, from -128…127 to 0…255.

    Both move by 128, so that the product is the same number. But where a processor has no int8
    instructions, onnxruntime multiplies unsigned inputs with signed weights in pairs that it adds up in
    16 bits, which overflow, and computes something else; unsigned with unsigned it computes exactly.
    """
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    operands = {
        name for node in proto.graph.node if node.op_type == "MatMulInteger" for name in (node.input[1], node.input[3])
    }
    for name in operands:
        signed = numpy_helper.to_array(weights[name])
        if signed.dtype == np.int8:
            unsigned = (signed.astype(np.int16) + 128).astype(np.uint8)
            weights[name].CopyFrom(numpy_helper.from_array(unsigned, name))
    return proto


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the quantizer's advice off the screen: it speaks through the root logger."""
    root = logging.getLogger()
    disabled, root.disabled = root.disabled, True
    try:
        yield
    finally:
        root.disabled = disabled
