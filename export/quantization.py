"""A float32 ONNX file to one with weights of 8 or 4 bits."""

import ast
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorData, TensorsData
from onnxruntime.quantization import quantize_dynamic as onnxruntime_quantize_dynamic

from prunelle.compression.quantization import QuantizationPlan
from prunelle.export.calibration import activation_ranges
from prunelle.export.files import published_when_done
from prunelle.export.inference import ExportError
from prunelle.export.onnx import save_checked
from prunelle.export.runner import Batch

# Left to choose, onnxruntime also quantizes Attention, into a node that it cannot load.
LINEAR_OPERATORS = ["MatMul", "Gemm"]
EMBEDDING_OPERATORS = ["Gather"]

INT4_BLOCK_SIZES = (16, 32, 64, 128, 256)  # what onnxruntime computes with
INT4_BLOCK_SIZE = 32


def quantize_dynamic(fp32_file: str | Path, output_file: str | Path, *, plan: QuantizationPlan | None = None) -> Path:
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

    Args:
        fp32_file: a file of `export_onnx`.
        output_file: as a rule `…/onnx/model_quantized.onnx`.
        plan: of a model trained with `Quantization`, which modules to quantize. By default all.

    Raises:
        ExportError: the file has none of the plan's linear modules.
    """
    output_file = Path(output_file)
    with published_when_done(output_file) as unfinished:
        proto = _loaded(fp32_file)
        nodes = None if plan is None else _nodes_of(proto, plan)
        proto = _quantized(proto, unfinished, LINEAR_OPERATORS + EMBEDDING_OPERATORS, nodes)
        save_checked(proto, unfinished)
    return output_file


def quantize_static(
    fp32_file: str | Path, output_file: str | Path, *, batches: Sequence[Batch], method: str = "minmax"
) -> Path:
    """Writes an int8 version whose ranges are fixed beforehand, and returns its path.

    As `quantize_dynamic`, but the inputs of linear layers have the ranges that `activation_ranges` finds on
    the calibration data. So what else is in a batch changes nothing, and no range has to be looked for at
    run time; a value beyond its range is clipped. The file has the form that other runtimes read too:
    QuantizeLinear and DequantizeLinear around float operators (QDQ), which onnxruntime fuses. What linear
    layers put out stays float32: rounding it as well would gain nothing where sums, norms and attention
    follow in float32.

    Args:
        fp32_file: a file of `export_onnx`.
        output_file: as a rule `…/onnx/model_int8.onnx`.
        batches: inputs like those that the model will see, unpadded; see `calibration_batches`.
        method: as `activation_ranges` takes it.
    """
    output_file = Path(output_file)
    with published_when_done(output_file) as unfinished:
        proto = _quantized(_loaded(fp32_file), unfinished, EMBEDDING_OPERATORS)
        linear = _linear_nodes(proto)
        names = list(dict.fromkeys(node.input[0] for node in linear))
        ranges = {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in zip(names, activation_ranges(proto, names, batches, method), strict=True)
        }
        with _silence():
            quantizer = QDQQuantizer(
                onnx.shape_inference.infer_shapes(proto),
                per_channel=True,
                reduce_range=True,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
                nodes_to_quantize=[node.name for node in linear],
                nodes_to_exclude=[],
                op_types_to_quantize=LINEAR_OPERATORS,
                extra_options={"OpTypesToExcludeOutputQuantization": LINEAR_OPERATORS},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        save_checked(quantizer.model.model, unfinished)
    return output_file


def quantize_int4(fp32_file: str | Path, output_file: str | Path, *, block_size: int = INT4_BLOCK_SIZE) -> Path:
    """Writes the version whose linear layers have weights of 4 bits, and returns its path.

    - Weights of linear layers on every token: 4 bits, one scale and zero point for each `block_size` of an
      output channel's weights (`MatMulNBits`, an operator of onnxruntime's own); products in float32.
    - Embeddings: 8 bits, as in the int8 files: in float32 they would make a small model's file larger than
      its int8 file.
    - The rest, such as a pooler and a classifier, which run once a text: float32.

    Args:
        fp32_file: a file of `export_onnx`.
        output_file: as a rule `…/onnx/model_q4.onnx`.
        block_size: one of `INT4_BLOCK_SIZES`; smaller ones are closer to the weights and take more space.
    """
    output_file = Path(output_file)
    with published_when_done(output_file) as unfinished, _silence():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        proto = _quantized(_loaded(fp32_file), unfinished, EMBEDDING_OPERATORS)
        quantizer = MatMulNBitsQuantizer(proto, bits=4, block_size=block_size)
        quantizer.process()
        save_checked(quantizer.model.model, unfinished)
    return output_file


def _loaded(file: str | Path) -> ModelProto:
    proto = onnx.load(file)
    _untie_weights(proto)
    # The exporter's shapes and those that the quantizers infer name free dimensions differently, which the
    # quantizers take for a contradiction.
    del proto.graph.value_info[:]
    return proto


def _quantized(
    proto: ModelProto, file: Path, operators: Sequence[str], nodes: Sequence[str] | None = None
) -> ModelProto:
    """The model with weights of these operators in 8 bits, and whatever of their inputs is computed too.

    `file` is where onnxruntime, which only writes to files, may leave it. Only the named nodes, if there are names.
    """
    with _silence():
        onnxruntime_quantize_dynamic(
            proto,
            file,
            op_types_to_quantize=list(operators),
            nodes_to_quantize=nodes,
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
    return onnx.load(file)


def _linear_nodes(proto: ModelProto) -> list[NodeProto]:
    """Products with a stored matrix."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    return [node for node in proto.graph.node if node.op_type in LINEAR_OPERATORS and node.input[1] in stored]


def _nodes_of(proto: ModelProto, plan: QuantizationPlan) -> list[str]:
    """Names of the nodes that the plan's modules became."""
    linear = [node.name for node in _linear_nodes(proto) if _module(node) in plan.linear]
    if not linear:
        raise ExportError(f"none of the {len(plan.linear)} quantized modules is in the ONNX file, as {plan.linear[0]}")
    tables = [node.name for node in proto.graph.node if node.op_type == "Gather" and _module(node) in plan.embeddings]
    # onnxruntime makes each Gemm a MatMul of this name first.
    return [*linear, *(f"{name}_MatMul" for name in linear), *tables]


def _module(node: NodeProto) -> str:
    """The qualified name of the module that a node was traced in; empty where it was in none."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    # From the outermost to the operation itself, below the wrapper that gives logits alone.
    path = ast.literal_eval(scopes)
    return path[-2].removeprefix("model.") if len(path) > 1 else ""


def _untie_weights(proto: ModelProto) -> None:
    """Stores transposed weights as such: the quantizers take only products with a stored matrix."""
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
    """Keeps the quantizers' advice off the screen: they speak through the root logger, and one sets it up."""
    root, own = logging.getLogger(), logging.getLogger("onnxruntime")
    before = list(root.handlers), root.level, root.disabled, own.level
    root.disabled = True
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.handlers[:], level, root.disabled, own_level = before
        root.setLevel(level)
        own.setLevel(own_level)
