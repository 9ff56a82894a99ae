"""Modules of a model that become others in the course of a run."""

from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from prunelle.compression.method import CompressionMethod
from prunelle.compression.ramp import check_shares, check_steps


class Blend(nn.Module):
    """A module on its way to another: `share` of what it computes, from 0 to 1, is already the other's."""

    share = 0.0

    def finished(self) -> nn.Module:
        """The other, alone."""
        raise NotImplementedError


class GradualReplacement(CompressionMethod):
    """Replaces modules gradually: the share of what comes instead grows linearly.

    Args:
        warmup: The share of the run before the change begins.
        cooldown: The share of the run that is left once it is complete.

    Raises:
        InputError: One is out of its range, or there is no room between them.

    Attributes:
        blends: By qualified name, once attached.
    """

    old: ClassVar[str]
    new: ClassVar[str]

    def __init__(self, warmup: float = 0.1, cooldown: float = 0.3) -> None:
        check_shares(warmup, cooldown)
        self.warmup, self.cooldown = warmup, cooldown
        self.blends: dict[str, Blend] = {}

    def attach(self, model: PreTrainedModel) -> None:
        self.model, self.blends = model, self.find(model)
        for name, blend in self.blends.items():
            model.set_submodule(name, blend.train(model.training))

    def find(self, model: PreTrainedModel) -> dict[str, Blend]:
        """What is to stand for the modules of a model that are replaced, by their qualified names.

        Raises:
            InputError: It has none.
        """
        raise NotImplementedError

    def start(self, steps: int) -> None:
        check_steps(self.warmup, self.cooldown, steps, f"{self.old} would become {self.new}")

    def step(self, progress: float) -> None:
        share = (progress - self.warmup) / (1 - self.cooldown - self.warmup)
        for blend in self.blends.values():
            blend.share = min(1.0, max(0.0, share))

    def metrics(self) -> dict[str, float]:
        return {f"{self.new.lower()}_share": next(iter(self.blends.values())).share}

    def finish(self) -> None:
        """Leave what came instead, alone.

        Raises:
            RuntimeError: There is something left of what was before.
        """
        for name, blend in self.blends.items():
            if blend.share != 1:
                raise RuntimeError(f"the run ended with a share of {blend.share} {self.new} in {name}, instead of 1")
            self.model.set_submodule(name, blend.finished())
