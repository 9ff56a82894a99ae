"""Inputs of linear modules in 8 bits: rounded by a module that a forward pre-hook calls."""

from typing import Any

import torch
from torch import Tensor, nn

from prunelle.compression.quantization.rounding import UINT8_MAX, round_all, round_within, uint8_grid
from prunelle.compression.quantization.weights import FakeQuantizer

NAME = "input_quantizer"
MOMENTUM = 0.9  # of the moving average


class DynamicInput(FakeQuantizer):
    """Rounds to unsigned integers of 8 bits, with a scale and a zero point from the range of the whole batch."""

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: of any shape. Returns them rounded."""
        if not self.enabled:
            return vectors
        scale, zero = uint8_grid(*torch.aminmax(vectors.detach()))
        return round_all(vectors, scale, -zero, UINT8_MAX - zero)


class StaticInput(FakeQuantizer):
    """Rounds to unsigned integers of 8 bits, with a scale and a zero point that a file can hold.

    They come from moving averages of the lowest and of the highest value of each batch, while it is `calibrating` and,
    if it is `observing`, in training. Where the scale is learned, averages give its first value and the zero point.

    Channels can be divided by numbers first, and multiplied by them once they are rounded (see `channel_divisors`).

    Args:
        width: of the vectors, how many channels.
        device: of the module.
        learned: whether the scale is learned (LSQ, arXiv:1902.08153).

    Attributes:
        divisors: (width,) what channels are divided by; 1 to begin with.
        low, high: (), the averages, of the divided channels.
        scale, zero: (), the grid.
    """

    enabled = False  # until there is a range
    calibrating = False
    observing = False
    divisors: Tensor
    low: Tensor
    high: Tensor
    zero: Tensor

    def __init__(self, width: int, device: torch.device | None = None, learned: bool = False) -> None:
        super().__init__()
        self.learned = learned
        self.register_buffer("divisors", torch.ones(width, device=device))
        for name, value in {"low": torch.inf, "high": -torch.inf, "zero": 0.0}.items():
            self.register_buffer(name, torch.tensor(value, device=device))
        scale = torch.ones((), device=device)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: of any shape. Returns them rounded, and clipped to the range."""
        if self.calibrating or (self.training and self.observing and not (self.learned and self.enabled)):
            self._observe(vectors.detach())
        if not self.enabled:
            # Part of the graph all the same: several processes wait for every parameter's gradient.
            return vectors + 0 * self.scale if self.learned and self.training else vectors
        return round_within(vectors, self.divisors, self.scale, -self.zero, UINT8_MAX - self.zero)

    @torch.no_grad()
    def _observe(self, vectors: Tensor) -> None:
        for average, value in zip((self.low, self.high), torch.aminmax(vectors / self.divisors), strict=True):
            average.copy_(torch.where(average.isinf(), value, average.lerp(value.to(average.dtype), 1 - MOMENTUM)))
        scale, zero = uint8_grid(self.low, self.high)
        self.scale.copy_(scale)
        self.zero.copy_(zero)


def quantize_inputs(module: nn.Module, quantizer: FakeQuantizer) -> None:
    """Has a module see its input as the quantizer leaves it. The quantizer becomes a part of the module."""
    module.add_module(NAME, quantizer)
    quantizer.hook = module.register_forward_pre_hook(_round_input)


def release_inputs(module: nn.Module) -> None:
    """Undoes `quantize_inputs`, if it has been done."""
    if isinstance(quantizer := getattr(module, NAME, None), FakeQuantizer):
        quantizer.hook.remove()
        delattr(module, NAME)


def _round_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return getattr(module, NAME)(arguments[0]), *arguments[1:]
