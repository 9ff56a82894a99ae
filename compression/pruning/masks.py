"""Masks on weights and biases, as parametrizations: a number for each unit, broadcast to all of its weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from prunelle.compression.pruning.structures import Layout

# The hard concrete distribution, as published: its temperature, and the interval that it is stretched to.
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
OPEN_AT_FIRST = math.log(0.9 / 0.1)  # where scores of gates begin: nine in ten are open
IS_OPEN = -TEMPERATURE * math.log(-LOW / HIGH)  # sigmoid(score + this) is the probability that a gate is not 0


class Mask(nn.Module):
    """A parametrization that multiplies a weight by its mask. The score is the weight's magnitude.

    Args:
        weight: the plain weight, or bias.
        layout: how units lie on it.

    Attributes:
        mask: of the shape `layout.units` and the weight's dtype, 1 where kept and 0 where not. A buffer: computed
            once an optimizer step, saved with the model. (On a CPU the product with booleans takes ten times as long.)
    """

    mask: Tensor

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        super().__init__()
        self.view = layout.view
        self.register_buffer("mask", torch.ones(layout.units, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.view(self.view) * self.mask).view_as(weight)

    def score(self, weight: Tensor) -> Tensor:
        """What units are ranked by, each by the mean over its weights: of the weight's shape."""
        return weight.detach().abs()


class FixedMask(Mask):
    """The scores are given: drawn once, or gathered from gradients by `UnitMasks`.

    Args:
        weight, layout: as for `Mask`.
        scores: of the mask's shape.
    """

    scores: Tensor

    def __init__(self, weight: Tensor, layout: Layout, scores: Tensor) -> None:
        super().__init__(weight, layout)
        self.register_buffer("scores", scores.to(weight.device))


class WandaMask(Mask):
    """The score is |w| times the norm of the input that the weight is multiplied by (Sun et al., arXiv:2306.11695).

    Args:
        weight, layout: as for `Mask`.

    Attributes:
        norms: (inputs, 1) where the weight is stored transposed, else (inputs,): found on examples, else 1.
    """

    norms: Tensor

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        super().__init__(weight, layout)
        shape = (weight.shape[0], 1) if layout.is_transposed else (weight.shape[1],)
        self.register_buffer("norms", torch.ones(shape, device=weight.device))

    def score(self, weight: Tensor) -> Tensor:
        return super().score(weight) * self.norms


class LearnedMask(Mask):
    """The scores are learned: movement pruning (Sanh et al., arXiv:2005.07683).

    A unit's score gets the gradient of its mask straight through: the sum over its weights of each one's gradient
    times the weight, where they are masked too. So a score grows while training moves its weights away from zero.

    Args:
        weight, layout: as for `Mask`.
        scores: with as many numbers as the mask; masks of the same units share them.
        holds_scores: whether they are among this mask's parameters; of those that share them, one has them there.
    """

    scores: nn.Parameter

    def __init__(self, weight: Tensor, layout: Layout, scores: nn.Parameter, holds_scores: bool = True) -> None:
        super().__init__(weight, layout)
        if holds_scores:
            self.scores = scores
        else:
            vars(self)["scores"] = scores  # nn.Module would take it for one more parameter, and save it again

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.scores, self.mask, self.view)


class HardConcreteMask(LearnedMask):
    """What is kept has random gates, the more often open the higher their scores (Louizos et al., arXiv:1712.01312).

    In training a gate is drawn from the hard concrete distribution, in evaluation it is what the paper puts in its
    place. Once frozen it is 1, so that the mask is all that is left.

    Attributes:
        noise: of the mask's shape, log(u / (1 - u)) of a uniform number for each unit; the same on all of its weights.
    """

    noise: Tensor

    def __init__(self, weight: Tensor, layout: Layout, scores: nn.Parameter, holds_scores: bool = True) -> None:
        super().__init__(weight, layout, scores, holds_scores)
        self.register_buffer("noise", torch.zeros(layout.units, device=weight.device), persistent=False)
        self.frozen = False

    def forward(self, weight: Tensor) -> Tensor:
        if self.frozen:
            return super().forward(weight)
        noisy = (self.scores + self.noise.view_as(self.scores)) / TEMPERATURE if self.training else self.scores
        gates = (noisy.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
        mask = self.mask * gates.detach().to(self.mask).view_as(self.mask)
        return _StraightThrough.apply(weight, gates, mask, self.view)


class _StraightThrough(torch.autograd.Function):
    """weight * mask, where the mask's gradient is the scores'."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, view: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.view, ctx.units = view, scores.shape
        return (weight.view(view) * mask).view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        weight, mask = ctx.saved_tensors
        of_weight = (gradient.reshape(ctx.view) * mask).view_as(weight)
        of_scores = (gradient * weight).reshape(ctx.view).sum_to_size(mask.shape)
        return of_weight, of_scores.view(ctx.units), None, None
