"""A float32 ONNX file to one with weights of 8 or 4 bits."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization import quantize_dynamic as onnxruntime_quantize_dynamic
from onnxruntime.quantization.onnx_model import ONNXModel

from prunelle.compression.quantization import QuantizationPlan
from prunelle.export.bias_correction import correct_biases
from prunelle.export.calibration import activation_ranges
from prunelle.export.compensation import compensate
from prunelle.export.files import published_when_done
from prunelle.export.inference import ExportError
from prunelle.export.onnx import save_checked
from prunelle.export.origin import module_of
from prunelle.export.qdq import uint8_grid, write_qdq
from prunelle.export.runner import Batch
from prunelle.export.smoothing import smooth, smooth_as_trained

# Left to choose, onnxruntime also quantizes Attention, into a node that it cannot load.
LINEAR_OPERATORS = ["MatMul", "Gemm"]
EMBEDDING_OPERATORS = ["Gather"]

GEMM_PRODUCT = "_MatMul"  # what onnxruntime adds to the name of a Gemm that it takes apart

INT4_BLOCK_SIZES = (16, 32, 64, 128, 256)  # what onnxruntime computes with
INT4_BLOCK_SIZE = 32


def quantize_dynamic(
    fp32_file: str | Path,
    output_file: str | Path,
    *,
    plan: QuantizationPlan | None = None,
    left_out: Collection[str] = (),
) -> Path:
    """Writes the int8 version of a file of `export_onnx`, and returns its path.

    - Weights of linear layers: signed, symmetric, one scale for each output channel, integers of -64 to
      64, so 7 bits of the 8. x86 processors without int8 instructions (AVX-512 VNNI, AVX-VNNI, AMX) add
      pairs of products in 16 bits, which 255 * 127 * 2 overflows and 255 * 64 * 2 does not. So one file
      computes the same on all of them. The bit costs nothing that shows: rounding the inputs
      outweighs it. Unsigned weights of 8 bits do not overflow either, but forgo the int8 instructions.
    - Inputs of linear layers: unsigned, 8 bits, one scale and zero point over the whole batch, from the
      range that it turns out to have, widened to hold zero. So no calibration data is needed, and what
      else is in a batch can change a prediction.
    - Embeddings: 8 bits, one scale for each row. Everything else, attention among it: float32.

    The file appears at `output_file` when it is complete and the ONNX checker has passed it.

    Args:
        fp32_file: a file of `export_onnx`.
        output_file: as a rule `…/onnx/model_quantized.onnx`.
        plan: of a model trained with `Quantization`, which modules to quantize. By default all.
        left_out: which of `quantizable_modules` to leave in float32.

    Raises:
        ExportError: the file has none of the plan's linear modules.
    """
    output_file = Path(output_file)
    with published_when_done(output_file) as unfinished:
        proto = _loaded(fp32_file)
        linear, tables = (
            [name for name, module in found.items() if module not in left_out]
            for found in (_linear(proto, plan), _tables(proto, plan))
        )
        proto = _with_tables(proto, unfinished, tables, plan)
        proto = _quantized(proto, unfinished, linear)
        save_checked(proto, unfinished)
    return output_file


def quantize_static(
    fp32_file: str | Path,
    output_file: str | Path,
    *,
    batches: Sequence[Batch] = (),
    method: str = "minmax",
    plan: QuantizationPlan | None = None,
) -> Path:
    """Writes an int8 version whose ranges are fixed beforehand, and returns its path.

    As `quantize_dynamic`, but the inputs of linear layers have the ranges that `activation_ranges` finds on
    the calibration data. So what else is in a batch changes nothing, and no range has to be looked for at
    run time; a value beyond its range is clipped. Channels of inputs that differ much in size are evened out
    first (`smooth`), weights make up for what others lose by rounding (`compensate`), and biases take back what
    it shifts on average (`correct_biases`). The file has the form that other runtimes read too: QuantizeLinear
    and DequantizeLinear around float operators (QDQ), which onnxruntime fuses. What linear layers put out stays
    float32: rounding it as well would gain nothing where sums, norms and attention follow in float32.

    Args:
        fp32_file: a file of `export_onnx`.
        output_file: as a rule `…/onnx/model_int8.onnx`.
        batches: inputs like those that the model will see, unpadded; see `calibration_batches`.
        method: as `activation_ranges` takes it.
        plan: of a model trained with `Quantization`, which modules to quantize, and the ranges and the channels evened
            out that it was trained with, in place of calibration.

    Raises:
        ExportError: as `quantize_dynamic`.
    """
    output_file = Path(output_file)
    with published_when_done(output_file) as unfinished:
        proto = _loaded(fp32_file)
        linear = _linear(proto, plan)
        proto = _with_tables(proto, unfinished, _tables(proto, plan), plan)
        if plan is not None:
            smooth_as_trained(proto, linear, plan.divisors)
            inputs = {name: plan.inputs[module] for name, module in linear.items()}
        else:
            smooth(proto, linear, batches)
            sources = {node.name: node.input[0] for node in proto.graph.node if node.name in linear}
            names = list(dict.fromkeys(sources.values()))
            ranges = activation_ranges(proto, names, batches, method)
            grids = {name: uint8_grid(*found) for name, found in zip(names, ranges, strict=True)}
            matrices = compensate(proto, linear, batches)
            correct_biases(proto, grids, linear, batches, matrices)
            inputs = {name: grids[source] for name, source in sources.items()}
        write_qdq(proto, inputs)
        _keep_products_apart(proto)
        save_checked(proto, unfinished)
    return output_file


def quantize_int4(
    fp32_file: str | Path,
    output_file: str | Path,
    *,
    block_size: int = INT4_BLOCK_SIZE,
    plan: QuantizationPlan | None = None,
) -> Path:
    """Writes the version whose linear layers have weights of 4 bits, and returns its path.

    - Weights of linear layers: 4 bits, one scale and zero point for each `block_size` of an output channel's
      weights (`MatMulNBits`, an operator of onnxruntime's own); products in float32.
    - Embeddings: 8 bits, as in the int8 files: in float32 they would make a small model's file larger than
      its int8 file.

    Args:
        fp32_file: a file of `export_onnx`.
        output_file: as a rule `…/onnx/model_q4.onnx`.
        block_size: one of `INT4_BLOCK_SIZES`; smaller ones are closer to the weights and take more space.
        plan: of a model trained with `Quantization`, which modules to quantize, in blocks of which size, and whether
            without zero points.

    Raises:
        ExportError: as `quantize_dynamic`.
    """
    output_file = Path(output_file)
    with published_when_done(output_file) as unfinished, _silence():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        proto = _loaded(fp32_file)
        linear = _linear(proto, plan)
        proto = _with_tables(proto, unfinished, _tables(proto, plan), plan)
        quantizer = MatMulNBitsQuantizer(
            proto,
            bits=4,
            block_size=block_size if plan is None else plan.block_size,
            is_symmetric=plan is not None and plan.symmetric,
            nodes_to_exclude=[node.name for node in proto.graph.node if node.name not in linear],
        )
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


def _quantized(proto: ModelProto, file: Path, nodes: Collection[str]) -> ModelProto:
    """The model with weights of the named nodes in 8 bits, and whatever of their inputs is computed too.

    `file` is where onnxruntime, which only writes to files, may leave it.
    """
    if not nodes:
        return proto
    with _silence():
        onnxruntime_quantize_dynamic(
            proto,
            file,
            op_types_to_quantize=LINEAR_OPERATORS + EMBEDDING_OPERATORS,
            nodes_to_quantize=list(nodes),
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
    return onnx.load(file)


def quantizable_modules(fp32_file: str | Path, plan: QuantizationPlan | None = None) -> list[str]:
    """Qualified names of the modules of a file of `export_onnx` whose weights `quantize_dynamic` rounds."""
    proto = _loaded(fp32_file)
    return list(dict.fromkeys([*_tables(proto, plan).values(), *_linear(proto, plan).values()]))


def _linear(proto: ModelProto, plan: QuantizationPlan | None) -> dict[str, str]:
    """Products with a stored matrix, all of them or the plan's, and the module of each, by the name of the node.

    They become MatMul nodes, as onnxruntime's quantizers would make them, with what is added in a node of its own.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type in LINEAR_OPERATORS and node.input[1] in stored]
    found = {
        f"{node.name}{GEMM_PRODUCT}" if node.op_type == "Gemm" else node.name: module_of(node) or node.name
        for node in nodes
    }
    ONNXModel(proto).replace_gemm_with_matmul()
    if plan is None:
        return found
    found = {name: module for name, module in found.items() if module in plan.linear}
    if not found:
        raise ExportError(f"none of the {len(plan.linear)} quantized modules is in the ONNX file, as {plan.linear[0]}")
    return found


def _tables(proto: ModelProto, plan: QuantizationPlan | None) -> dict[str, str]:
    """Nodes that look up in a stored table of numbers, all of them or the plan's, and the module of each, by the name
    of the node.
    """
    tables = {
        tensor.name
        for tensor in proto.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
    }
    nodes = [
        node
        for node in proto.graph.node
        if node.op_type in EMBEDDING_OPERATORS
        and node.input[0] in tables
        and not any(attribute.name == "axis" and attribute.i for attribute in node.attribute)
    ]
    found = {node.name: module_of(node) or node.name for node in nodes}
    return found if plan is None else {name: module for name, module in found.items() if module in plan.tables}


def _with_tables(proto: ModelProto, file: Path, nodes: Collection[str], plan: QuantizationPlan | None) -> ModelProto:
    """The model with the tables of the named nodes in 8 bits: one scale for each row, or each table if the plan says
    so. `file` is as `_quantized` takes it.
    """
    if plan is not None and plan.embeddings == "tensor":
        return _quantized(proto, file, nodes)
    by_table: dict[str, list[NodeProto]] = {}
    for node in proto.graph.node:
        if node.name in nodes:
            by_table.setdefault(node.input[0], []).append(node)
    for name, readers in by_table.items():
        _quantize_rows(proto, name, readers)
    return proto


def _quantize_rows(proto: ModelProto, name: str, nodes: Sequence[NodeProto]) -> None:
    """Has nodes look up integers and the scale of their row in a table, in place of numbers, and multiply them."""
    graph = proto.graph
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
    table = numpy_helper.to_array(tensor)
    scale = np.abs(table).max(1, keepdims=True) / np.float32(127)
    scale[scale < np.finfo(np.float32).tiny] = 1
    graph.initializer.append(numpy_helper.from_array(np.round(table / scale).astype(np.int8), f"{name}_quantized"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    for node in nodes:
        places, (looked_up,) = node.input[1], node.output
        parts = [f"{looked_up}_{part}" for part in ("quantized", "float", "scale")]
        place = list(graph.node).index(node)
        graph.node.remove(node)
        for made in reversed(
            (
                onnx.helper.make_node("Gather", [f"{name}_quantized", places], [parts[0]], f"{node.name}_quantized"),
                onnx.helper.make_node("Cast", [parts[0]], [parts[1]], f"{node.name}_float", to=onnx.TensorProto.FLOAT),
                onnx.helper.make_node("Gather", [f"{name}_scale", places], [parts[2]], f"{node.name}_scale"),
                onnx.helper.make_node("Mul", parts[1:], [looked_up], f"{node.name}_product"),
            )
        ):
            graph.node.insert(place, made)
    if not any(name in node.input for node in graph.node):
        graph.initializer.remove(tensor)


def _keep_products_apart(proto: ModelProto) -> None:
    """Has Sum add what a Gemm added.

    onnxruntime would make MatMul and Add a Gemm again, and compute it in float32, its weights converted at every run.
    """
    products = {node.output[0] for node in proto.graph.node if node.name.endswith(GEMM_PRODUCT)}
    for node in proto.graph.node:
        if node.op_type == "Add" and node.input[0] in products:
            node.op_type = "Sum"


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
