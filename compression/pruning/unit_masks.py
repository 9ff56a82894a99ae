"""The masks of one group of units, on all the weights and biases that they lie on, and the units' scores."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from prunelle.compression.pruning.masks import OPEN_AT_FIRST, FixedMask, HardConcreteMask, LearnedMask, Mask, WandaMask
from prunelle.compression.pruning.structures import UnitGroup

LEARNED = ("movement", "soft_movement", "l0")
CALIBRATED = ("wanda", "head_importance")  # by examples, before anything is trained
MEMORY = 0.99  # Of scores that are running means, from one optimizer step to the next.


class UnitMasks:
    """Registers a group's masks in a model.

    Args:
        model: whose weights are plain there.
        group: units of this model.
        score: what they are ranked by; see `Pruning`.
        score_init: where learned scores begin; see `Pruning`.
        generator: a CPU generator for random scores and noise, so that they are the same on every device.

    Attributes:
        modules: by qualified name.
        masks: of the weights, by their qualified names. All have the same numbers, a place for each unit.
        learned: the scores that training changes, of the first mask's shape, if there are any.
    """

    def __init__(
        self, model: nn.Module, group: UnitGroup, score: str, score_init: str, generator: torch.Generator
    ) -> None:
        self.group, self.needs_gradient = group, score in (*LEARNED, "taylor")
        self.modules: dict[str, Any] = {name: model.get_submodule(name) for name in group.layouts}
        self.masks: dict[str, Mask] = {}
        self.learned: nn.Parameter | None = None
        self._bias_masks: dict[str, Mask] = {}
        if score in LEARNED:
            first = self._first_scores(score_init, generator)
            self.learned = nn.Parameter(first + OPEN_AT_FIRST if score == "l0" else first)
        for name, layout in group.layouts.items():
            module = self.modules[name]
            mask = (WandaMask if score == "wanda" else Mask)(module.weight, layout)
            if self.learned is not None:
                kind = HardConcreteMask if score == "l0" else LearnedMask
                mask = kind(module.weight, layout, self.learned, holds_scores=not self.masks)
            elif score == "random" and not self.masks:
                mask = FixedMask(module.weight, layout, torch.rand(layout.units, generator=generator))
            elif score in ("taylor", "head_importance") and not self.masks:
                mask = FixedMask(module.weight, layout, torch.zeros(layout.units))
            self.masks[f"{name}.weight"] = mask
            register_parametrization(module, "weight", mask)
            if group.masks_biases and layout.has_rows and module.bias is not None:
                self._bias_masks[name] = Mask(module.bias, layout.of_bias)
                register_parametrization(module, "bias", self._bias_masks[name])

    @property
    def kept(self) -> Tensor:
        """(units,) bool."""
        return self._first.mask.flatten() > 0

    def ranking(self) -> Tensor:
        """What the units are ranked by: (units,)."""
        if isinstance(self._first, LearnedMask | FixedMask):
            scores = self._first.scores.detach().flatten()
        else:
            pairs = zip(self.masks.values(), self._originals, strict=True)
            scores = self._mean(mask.score(weight) for mask, weight in pairs)
        return self.group.lift(scores)

    @property
    def has_gradient(self) -> bool:
        """Whether the loss depends on the units. A penalty is no answer: scores get a gradient from it in any case."""
        taught: list[Any] = [weight for weight in self._originals if weight.requires_grad] or [self.learned]
        return any(tensor is not None and tensor.grad is not None and bool(tensor.grad.any()) for tensor in taught)

    def set_scores(self, scores: Tensor) -> None:
        """Take (units,) scores that were found elsewhere."""
        self._first.scores.copy_(scores.view_as(self._first.scores))

    def observe(self) -> None:
        """Take the gradients of an optimizer step into scores that are running means."""
        gradients = (weight * (0.0 if weight.grad is None else weight.grad) for weight in self._originals)
        importance = self._sum(gradients).abs().nan_to_num(0.0, 0.0)  # in float16 a step may overflow, and is not taken
        self._first.scores.lerp_(importance.view_as(self._first.scores).float(), 1 - MEMORY)

    def keep(self, kept: Tensor) -> None:
        """Set all masks.

        Args:
            kept: (units,) bool.
        """
        for mask in self.masks.values():
            mask.mask.copy_(kept.view(torch.uint8).view_as(mask.mask))  # six times as fast as from bool, on a CPU
        for name, bias_mask in self._bias_masks.items():
            bias_mask.mask.copy_(self.group.layouts[name].rows(self.masks[f"{name}.weight"].mask))

    def check(self) -> None:
        """See that what the model computes with is what the masks say, on every weight and bias.

        Raises:
            RuntimeError: It is not.
        """
        kept = self.kept
        if not self.group.follows_pattern(kept):
            raise RuntimeError(f"{self.group.name} does not have {self.group.pattern} weights in every run")
        for name, layout in self.group.layouts.items():
            module, mask = self.modules[name], self.masks[f"{name}.weight"].mask
            has_left = layout.gather((module.weight != 0).float()) > 0
            if not torch.equal(mask.flatten() > 0, kept) or (has_left & ~kept).any():
                raise RuntimeError(f"{name} is not masked as {self.group.name} is")
            if name in self._bias_masks:
                rows = layout.rows(mask).expand(layout.of_bias.view).flatten()
                if module.bias[rows == 0].any():
                    raise RuntimeError(f"{name} has biases in rows that are gone")

    def draw(self, generator: torch.Generator) -> None:
        """Draw the gates of the next optimizer step, where there are some."""
        drawn = torch.rand(self.group.count, generator=generator, device=generator.device)
        noise = drawn.clamp(1e-6, 1 - 1e-6).logit()
        for mask in self.masks.values():
            assert isinstance(mask, HardConcreteMask)
            mask.noise.copy_(noise.view_as(mask.noise))

    @property
    def _first(self) -> Any:
        return next(iter(self.masks.values()))

    @property
    def _originals(self) -> list[Tensor]:
        """The weights behind the masks."""
        return [module.parametrizations.weight.original for module in self.modules.values()]

    def _first_scores(self, start: str, generator: torch.Generator) -> Tensor:
        """Where learned scores begin, in float32 at least."""
        weights = [module.weight.detach() for module in self.modules.values()]
        weights = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
        units = next(iter(self.group.layouts.values())).units
        if start == "magnitude":
            # A matrix of zeros has no spread either.
            return self._mean(weight.abs() / weight.std().clamp(min=1e-12) for weight in weights).view(units)
        noise = torch.randn(units, generator=generator) * 0.01
        return noise.to(weights[0]) if start == "noise" else weights[0].new_zeros(units)

    def _sum(self, values: Iterable[Tensor]) -> Tensor:
        """Over the weights of each unit: (units,). Of values of each weight's shape."""
        sums = [layout.gather(value) for layout, value in zip(self.group.layouts.values(), values, strict=True)]
        return sum(sums[1:], sums[0])

    def _mean(self, values: Iterable[Tensor]) -> Tensor:
        return self._sum(values) if self.group.size == 1 else self._sum(values) / self.group.size
