"""What a model's weights weigh: bytes, compressed bytes, numbers, and how many of them are not zero."""

import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, numpy_helper
from torch import nn

from prunelle.compression.pruning import density_by_weight
from prunelle.compression.record import read_record
from prunelle.errors import InputError

ZLIB_LEVEL = 6  # zip's and gzip's usual one

PRUNED = 0.99  # below this density; a matrix that was trained and not pruned has hardly a zero

CHUNK = 1 << 20

WEIGHT_TYPES = {
    getattr(TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "INT4", "UINT4")
}
INT8_OPERATORS = {"MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear", "QLinearMatMul"}


@dataclass(frozen=True)
class Weights:
    """
    Attributes:
        format: `torch`, or `onnx` with the lowest precision in the file: `onnx-int4`, `onnx-int8`, `onnx-fp16`.
        size_bytes: of the files; of the tensors where they are not in files of this precision.
        compressed_bytes: the same through zlib at `ZLIB_LEVEL`.
        parameters: how many numbers are stored, tied ones once.
        nonzero_parameters: how many of them are not zero; None where the file's packing hides it.
        density: of a pruned checkpoint, what is left of each matrix, from 0 to 1, by qualified name: as its record
            says, which knows what was taken out too, or as counted. Else empty.
        kept_layers: of a checkpoint that lost whole layers, those that are left.
    """

    format: str
    size_bytes: int
    compressed_bytes: int
    parameters: int
    nonzero_parameters: int | None
    density: dict[str, float] = field(default_factory=dict)
    kept_layers: list[int] | None = None


def torch_weights(model: nn.Module, folder: Path | None) -> Weights:
    """Of a model in PyTorch; `folder` holds its safetensors files, where there are any."""
    parameters = list(model.parameters())
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    size, compressed = _sizes(_read(files) if files else _tensor_bytes(model))
    record = (read_record(folder) if folder is not None else None) or {}
    density = density_by_weight(model, (name for name, _ in model.named_parameters()))
    is_pruned = min(density.values(), default=1.0) < PRUNED
    return Weights(
        "torch",
        size,
        compressed,
        sum(parameter.numel() for parameter in parameters),
        sum(int(torch.count_nonzero(parameter)) for parameter in parameters),
        record.get("density") or (density if is_pruned else {}),
        record.get("kept_layers"),
    )


def onnx_weights(file: Path) -> Weights:
    """Of an ONNX file. Raises as `read_onnx` does."""
    proto = read_onnx(file)
    size, compressed = _sizes(_read([file, *_external_files(proto, file)]))
    try:
        onnx.load_external_data_for_model(proto, str(file.parent))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise InputError(f"{file}: its weights cannot be read: {' '.join(str(error).split())}") from error
    packed = {node.input[1]: node for node in proto.graph.node if node.op_type == "MatMulNBits"}
    scales = {name for node in packed.values() for name in node.input[2:]}
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    parameters, nonzero, hidden = 0, 0, False
    for name, tensor in tensors.items():
        if name in packed:
            shape = {attribute.name: attribute.i for attribute in packed[name].attribute}
            parameters += shape["K"] * shape["N"]
            hidden = True
            continue
        # Scalars are the graph's constants; onnxruntime's quantizer names what goes with a weight after it.
        if tensor.data_type not in WEIGHT_TYPES or not tensor.dims or name in scales:
            continue
        if name.endswith(("_scale", "_zero_point")):
            continue
        values = numpy_helper.to_array(tensor)
        zero_points = tensors.get(f"{name.removesuffix('_quantized')}_zero_point")
        zeros = np.unique(numpy_helper.to_array(zero_points)) if zero_points is not None else np.zeros(1)
        parameters += values.size
        nonzero += int(np.count_nonzero(values != zeros[0].astype(values.dtype)))
        hidden |= len(zeros) > 1  # a zero of its own for each channel
    return Weights(_onnx_format(proto), size, compressed, parameters, None if hidden else nonzero)


def _onnx_format(proto: ModelProto) -> str:
    operators = {node.op_type for node in proto.graph.node}
    if "MatMulNBits" in operators:
        return "onnx-int4"
    if operators & INT8_OPERATORS:
        return "onnx-int8"
    types = {tensor.data_type for tensor in proto.graph.initializer if tensor.dims}
    return "onnx-fp16" if TensorProto.FLOAT16 in types else "onnx"


def read_onnx(file: Path) -> ModelProto:
    """The graph of an ONNX file, its external data checked and not read.

    Raises:
        InputError: It is no ONNX file, or its weights are missing or not in its own folder: a file from
            elsewhere could read anything there is.
    """
    try:
        proto = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf's own, which differs by its implementation
        raise InputError(f"{file} is not an ONNX file") from error
    if not proto.graph.node:
        raise InputError(f"{file} is not an ONNX file")
    for weights in _external_files(proto, file):
        if not weights.is_file():
            raise InputError(f"{file} lacks its weights: there is no file {weights}")
    return proto


def _external_files(proto: ModelProto, file: Path) -> list[Path]:
    folder = os.path.abspath(file.parent)
    found: dict[Path, None] = {}
    for tensor in _tensors(proto.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        # As it is written, and links not followed: the hub's cache keeps every file as a link to elsewhere.
        path = os.path.normpath(os.path.join(folder, location))
        if not Path(path).is_relative_to(folder) or path == folder:
            raise InputError(f"{file} keeps its weights in {location!r}, which is not in its folder")
        found[Path(path)] = None
    return list(found)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every stored tensor, those in attributes and inner graphs too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
            for inner in (*attribute.graphs, *([attribute.g] if attribute.type == AttributeProto.GRAPH else [])):
                yield from _tensors(inner)


def _sizes(chunks: Iterable[bytes]) -> tuple[int, int]:
    compressor = zlib.compressobj(ZLIB_LEVEL)
    size = compressed = 0
    for chunk in chunks:
        size += len(chunk)
        compressed += len(compressor.compress(chunk))
    return size, compressed + len(compressor.flush())


def _read(files: Iterable[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk


def _tensor_bytes(model: nn.Module) -> Iterator[bytes]:
    seen = set()
    for tensor in model.state_dict().values():
        if (tensor.data_ptr(), tensor.shape) in seen:
            continue
        seen.add((tensor.data_ptr(), tensor.shape))
        content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        for start in range(0, content.size, CHUNK):
            yield content[start : start + CHUNK].tobytes()
