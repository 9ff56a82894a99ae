"""Inputs of linear modules in 8 bits: rounded by a module that a forward pre-hook calls."""

from typing import Any

import torch
from torch import Tensor, nn

from prunelle.compression.quantization.rounding import UINT8_MAX, round_all, uint8_grid
from prunelle.compression.quantization.weights import FakeQuantizer

NAME = "input_quantizer"


class DynamicInput(FakeQuantizer):
    """Rounds to unsigned integers of 8 bits, with a scale and a zero point from the range of the whole batch."""

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: of any shape. Returns them rounded."""
        if not self.enabled:
            return vectors
        scale, zero = uint8_grid(*torch.aminmax(vectors.detach()))
        return round_all(vectors, scale, -zero, UINT8_MAX - zero)


def quantize_inputs(module: nn.Module, quantizer: nn.Module) -> None:
    """Has a module see its input as the quantizer leaves it. The quantizer becomes a part of the module."""
    module.add_module(NAME, quantizer)
    quantizer.hook = module.register_forward_pre_hook(_round_input)  # type: ignore[assignment]


def release_inputs(module: nn.Module) -> None:
    """Undoes `quantize_inputs`, if it has been done."""
    if isinstance(quantizer := getattr(module, NAME, None), FakeQuantizer):
        quantizer.hook.remove()  # type: ignore[operator, union-attr]
        delattr(module, NAME)


def _round_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return getattr(module, NAME)(arguments[0]), *arguments[1:]
