"""Rounding to a grid of few values, with gradients that pass straight through (arXiv:1308.3432)."""

from typing import Any

import torch
from torch import Tensor

UINT8_MAX = 255


class _RoundAll(torch.autograd.Function):
    """Rounds to multiples of a scale. The grid holds all values, but for rounding, so every gradient passes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, lowest: Any, highest: Any) -> Tensor:
        return (values / scale).round_().clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


def round_all(values: Tensor, scale: Tensor, lowest: Tensor | int, highest: Tensor | int) -> Tensor:
    """Rounds values to whole multiples of a scale, ties to the even one.

    Args:
        values: float, of any shape.
        scale: broadcast to it.
        lowest, highest: the least and the greatest multiple that there is. Values reach beyond them by less than one.

    Returns:
        Tensor: of the values' shape; its gradient is the values'.
    """
    return _RoundAll.apply(values, scale, lowest, highest)


def uint8_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of unsigned 8-bit integers between two values, widened to hold zero.

    Args:
        low, high: the ends of the range, of one shape.

    Returns:
        The scale, 1 where the range is zero alone, and the integer that stands for zero, of that shape.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / UINT8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-low / scale).round().clamp(0, UINT8_MAX)
