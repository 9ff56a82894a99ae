"""Masks on weights, as parametrizations: what is kept is decided by a score of each weight."""

from typing import Any

import torch
from torch import Tensor, nn


class Mask(nn.Module):
    """A parametrization that multiplies a weight by its mask. The score is the weight's magnitude.

    Args:
        weight: the plain weight.

    Attributes:
        mask: of the weight's shape and dtype, 1 where kept and 0 where not. A buffer: computed once an optimizer
            step, saved with the model. (On a CPU the product with booleans takes ten times as long.)
    """

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, requires_grad=False))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def score(self, weight: Tensor) -> Tensor:
        """What the weights are ranked by, of their shape."""
        return weight.detach().abs()


class FixedMask(Mask):
    """The scores are given, and stay.

    Args:
        weight: the plain weight.
        scores: of its shape.
    """

    scores: Tensor

    def __init__(self, weight: Tensor, scores: Tensor) -> None:
        super().__init__(weight)
        self.register_buffer("scores", scores)

    def score(self, weight: Tensor) -> Tensor:
        return self.scores


class LearnedMask(Mask):
    """The scores are learned: movement pruning (Sanh et al., arXiv:2005.07683).

    A score's gradient is passed straight through the mask: that of its masked weight times the weight, where it is
    masked too. So a score grows while training moves its weight away from zero.

    Args:
        weight: the plain weight.
        scores: their first values, of its shape.
    """

    def __init__(self, weight: Tensor, scores: Tensor) -> None:
        super().__init__(weight)
        self.scores = nn.Parameter(scores)

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.scores, self.mask)

    def score(self, weight: Tensor) -> Tensor:
        return self.scores.detach()


class _StraightThrough(torch.autograd.Function):
    """weight * mask, where the mask's gradient is the scores'."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


def first_scores(weight: Tensor, start: str, generator: torch.Generator) -> Tensor:
    """Where learned scores begin.

    Args:
        weight: the plain weight.
        start: `magnitude`: |w| / std(w), so that the first masks are those of magnitude pruning and all weights'
            scores are of one scale; `zero`, as published; `noise`: normal, of standard deviation 0.01.
        generator: a CPU generator, so that the noise is the same on every device.

    Returns:
        Scores of the weight's shape, on its device, in float32 at least.
    """
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if start == "magnitude":
        return weight.abs() / weight.std()
    noise = torch.randn(weight.shape, generator=generator) * 0.01
    return noise.to(weight) if start == "noise" else torch.zeros_like(weight)
