"""Where an ONNX file parts from the PyTorch model that it was exported from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn
from transformers.utils import ModelOutput

from prunelle.export.calibration import tensors_within
from prunelle.export.inference import LogitsOnly, output_names
from prunelle.export.origin import modules_around


def tolerance(expected: NDArray[np.float32]) -> float:
    """The largest difference that rounding in float32 explains: 1e-4 of the largest value, or of one.

    A language model's logits reach 30 and more, and float32 rounds in proportion.
    """
    return 1e-4 * max(1.0, float(np.abs(expected).max(initial=0.0)))


def parting(model: nn.Module, file: Path, batch: Mapping[str, Tensor], attended: NDArray[np.bool_]) -> str:
    """The first node that gives something else than its module does, as a sentence that goes on.

    Modules are gone through as PyTorch finishes them, those that run once and have a row of float32 for each text;
    a module's node is the last that was traced in it. At padded positions nothing is compared.

    Args:
        model: as `inference.deployed` makes it.
        file: of `export_onnx`.
        batch: the file's inputs, (batch, length) int64, with which the two differ.
        attended: (batch, length), where words are.
    """
    proto = onnx.load(file)
    makers = {name: node for node in proto.graph.node for name in node.output}
    last = {module: node.output[0] for node in proto.graph.node for module in modules_around(node)}
    shown = {each.name for each in proto.graph.value_info if each.type.tensor_type.elem_type == TensorProto.FLOAT}
    modules, logits = _outputs(model, batch)
    compared = [
        (last[module], f"the output of {module}", expected)
        for module, expected in modules.items()
        if last.get(module) in shown
    ]
    compared += [(name, name, expected) for name, expected in zip(output_names(model), logits, strict=True)]
    names = list(dict.fromkeys(name for name, _, _ in compared))
    (tensors,) = tensors_within(proto, names, [batch])
    computed = dict(zip(names, tensors, strict=True))
    for name, what, tensor in compared:
        expected = tensor.numpy()
        if computed[name].shape == expected.shape and not _agree(expected, computed[name], attended):
            return f"they part at node {makers[name].name} ({makers[name].op_type}), which gives {what}"
    return "module by module they agree, so it is what onnxruntime fuses that differs"


def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """What each module gives, in the order in which they finish, and the logits."""
    found: dict[str, Tensor] = {}
    finished: set[str] = set()

    def keep(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | ModelOutput) else output
        if name in finished:
            found.pop(name, None)
        elif isinstance(first, Tensor) and first.dtype == torch.float32:
            found[name] = first.clone()
        finished.add(name)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.inference_mode():
            return found, LogitsOnly(model)(**batch)
    finally:
        for hook in hooks:
            hook.remove()


def _agree(expected: NDArray[np.float32], computed: NDArray[np.float32], attended: NDArray[np.bool_]) -> bool:
    """Whether rounding explains all differences; of tensors that have no row for each text, always."""
    if expected.shape[:2] == attended.shape:
        expected, computed = expected[attended], computed[attended]
    elif expected.ndim != 2 or len(expected) != len(attended):
        return True
    return bool(np.abs(expected - computed).max(initial=0.0) <= tolerance(expected))  # false of NaN
