"""Rounding to a grid of few values, with gradients that pass straight through (arXiv:1308.3432)."""

from typing import Any

import torch
from torch import Tensor

UINT8_MAX = 255


class _RoundAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, lowest: Any, highest: Any) -> Tensor:
        return (values / scale).round_().clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


class _RoundWithin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, divisors: Tensor, scale: Tensor, lowest: Any, highest: Any) -> Tensor:
        steps = (values * (1 / divisors)).div_(scale)  # in the order in which a file has it
        rounded = steps.round().clamp_(lowest, highest)
        inside = (steps >= lowest - 0.5) & (steps <= highest + 0.5)
        ctx.save_for_backward(inside, *((steps, rounded, divisors) if ctx.needs_input_grad[2] else ()))
        return (rounded * (scale * divisors)).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, Tensor | None, None, None]:
        (gradient,) = gradients
        inside, *kept = ctx.saved_tensors
        to_scale = None
        if kept:
            steps, rounded, divisors = kept
            change = torch.where(inside, rounded - steps, rounded).mul_(divisors)
            to_scale = (gradient * change).sum() / (UINT8_MAX * gradient.shape[-1]) ** 0.5
        return torch.where(inside, gradient, 0.0), None, to_scale, None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, signs: Tensor, input_axis: int) -> Tensor:
        ctx.save_for_backward(signs)
        ctx.input_axis = input_axis
        return signs * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        (signs,) = ctx.saved_tensors
        to_scale = (gradient * signs).sum(ctx.input_axis, keepdim=True) / signs.shape[ctx.input_axis] ** 0.5
        return gradient, to_scale, None, None


def scale_signs(weight: Tensor, scale: Tensor, signs: Tensor, input_axis: int) -> Tensor:
    """What stands for a weight of so few bits that each is a sign, or zero, times a learned scale.

    The weight's gradient is that of what stands for it, all of it: only its sign counts, so that no range ends
    anywhere. The scale's is that of learned step size quantization (arXiv:1902.08153).

    Args:
        weight, signs: (outputs, inputs), or the other way round.
        scale: the same, with 1 for inputs.
        input_axis: where inputs are.
    """
    return _Scale.apply(weight, scale, signs, input_axis)


def round_all(values: Tensor, scale: Tensor, lowest: Tensor | int, highest: Tensor | int) -> Tensor:
    """Rounds values to whole multiples of a scale, ties to the even one.

    Args:
        values: float, of any shape.
        scale: broadcast to it.
        lowest, highest: the least and the greatest multiple that there is. No value reaches beyond them by a whole one.

    Returns:
        Tensor: of the values' shape; its gradient is the values', all of it, since the grid holds them all.
    """
    return _RoundAll.apply(values, scale, lowest, highest)


def round_within(values: Tensor, divisors: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Rounds divided values to whole multiples of a scale, ties to the even one; what lies beyond the ends is clipped.

    A value's gradient passes where it is rounded and not clipped. The scale's is that of learned step size quantization
    (LSQ, Esser et al., arXiv:1902.08153): how a rounded value changes with it, by its multiple less what the multiple
    was rounded from, or by the end where it is clipped; divided by the root of features times steps.

    Args:
        values: (..., features), float.
        divisors: (features,), what values are divided by before, and multiplied by afterwards.
        scale: (), learned or not.
        lowest, highest: (), the least and the greatest multiple that there is.

    Returns:
        Tensor: of the values' shape.
    """
    return _RoundWithin.apply(values, divisors, scale, lowest, highest)


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
