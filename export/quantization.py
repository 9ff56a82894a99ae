"""A float32 ONNX file to an int8 one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import ModelProto, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization import quantize_dynamic as onnxruntime_quantize_dynamic

from prunelle.export.files import published_when_done

# Left to choose, onnxruntime also quantizes Attention, into a node that it cannot load.
QUANTIZED_OPERATORS = ["MatMul", "Gemm", "Gather"]


def quantize_dynamic(fp32_file: str | Path, output_file: str | Path) -> Path:
    """Writes the int8 version of a file of `export_onnx`, and returns its path.

    - Weights of linear layers: signed, symmetric, one scale for each output channel, integers of -64 to
      64, so 7 bits of the 8. x86 processors without int8 instructions (AVX-512 VNNI, AVX-VNNI, AMX) add
      pairs of products in 16 bits, which 255 * 127 * 2 overflows and 255 * 64 * 2 does not. So one file
      computes the same on all of them. The bit costs nothing that shows: rounding the inputs
      outweighs it. Unsigned weights of 8 bits do not overflow either, but forgo the int8 instructions.
    - Inputs of linear layers: unsigned, 8 bits, one scale and zero point over the whole batch, from the
      range that it turns out to have, widened to hold zero. So no calibration data is needed, and what
      else is in a batch can change a prediction.
    - Embeddings: 8 bits, one scale for each table. Everything else, attention among it: float32.

    The file appears at `output_file` when it is complete and the ONNX checker has passed it.
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
            reduce_range=True,
        )
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


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the quantizer's advice off the screen: it speaks through the root logger."""
    root = logging.getLogger()
    disabled, root.disabled = root.disabled, True
    try:
        yield
    finally:
        root.disabled = disabled
