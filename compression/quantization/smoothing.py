"""Inputs of linear modules whose channels differ in size, evened out before all of a tensor shares one scale.

Some channels of a transformer's activations are many times as large as the others, which one scale for all then leaves
with few steps. Dividing each channel by a number and multiplying the weights that read it by the same one changes
nothing but what is lost by rounding: SmoothQuant (arXiv:2211.10438).
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression.quantization.rounding import UINT8_MAX, round_within, uint8_grid
from prunelle.compression.quantization.weights import Int8Weight

HALVINGS = range(1, 7)  # of the largest channel: what is larger than that is divided
EXPONENTS = (0.5, 0.75, 1.0)  # how much of what a channel is too large by its weights take over
WEIGHTS_SHARE = 0.25  # of their error, what is left of it by `compensated`: 0.2 on a fine-tuned MiniLM
WORTH = 0.6  # the share of the error that may be left where channels are divided for it
ROWS = 1024  # of each input, on which the error is measured


@torch.no_grad()
def channel_divisors(rows: Tensor, low: Tensor, high: Tensor, weight: Tensor) -> Tensor | None:
    """What to divide the channels of an input by, None where that does not spare enough of the error.

    Channels larger than a limit are divided by `(max|x| / limit)^a`, all others by 1. Limit and `a` are chosen by the
    mean squared error that rounding leaves in the products. (SmoothQuant's own `max|x|^a / max|w|^(1-a)`, which divides
    every channel, left 1.4 to 2 times that error in the second matrices of a MiniLM's feed-forward networks.)

    Args:
        rows: (rows, channels) of the input.
        low, high: (channels,) the range of each channel.
        weight: (outputs, channels) all that reads the input.

    Returns:
        (channels,)
    """
    size = torch.maximum(-low, high)
    limits = [size.max().clamp(min=torch.finfo(size.dtype).tiny) / 2**halvings for halvings in HALVINGS]
    candidates = [(size / limit).clamp(min=1) ** exponent for limit in limits for exponent in EXPONENTS]
    before, *errors = [_error(rows, low, high, weight, divisors) for divisors in (torch.ones_like(size), *candidates)]
    least = min(range(len(errors)), key=errors.__getitem__)
    return candidates[least] if errors[least] < WORTH * before else None


def _error(rows: Tensor, low: Tensor, high: Tensor, weight: Tensor, divisors: Tensor) -> float:
    """Mean squared, of the products of rounded rows and of those with the rounded matrix."""
    scale, zero = uint8_grid((low / divisors).min(), (high / divisors).max())
    lost = round_within(rows, divisors, scale, -zero, UINT8_MAX - zero) - rows
    lost_by_weights = Int8Weight(1, divisors)(weight) - weight
    return ((lost @ weight.T).square().mean() + WEIGHTS_SHARE * (rows @ lost_by_weights.T).square().mean()).item()


class InputWatch:
    """While it is entered, takes note of what linear modules are given: some rows, and each channel's range.

    Args:
        model: which is to be run, in float32.
        modules: the linear ones to watch, by name.
        samples: how many examples it will be run on.
    """

    def __init__(self, model: PreTrainedModel, modules: Mapping[str, nn.Module], samples: int) -> None:
        self.model, self.modules, self.samples = model, modules, samples
        self.rows: dict[str, list[Tensor]] = defaultdict(list)
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self.latest: dict[str, list[Tensor]] = defaultdict(list)  # inputs of the latest batch
        self.draw = torch.Generator().manual_seed(0)

    def __enter__(self) -> "InputWatch":
        self.hooks = [self.model.register_forward_pre_hook(lambda *arguments: self.latest.clear())]
        for name, module in self.modules.items():
            self.hooks.append(module.register_forward_pre_hook(partial(self._see, name), prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()

    def inputs(self) -> Iterator[tuple[list[str], Tensor, Tensor, Tensor]]:
        """Each input: the modules that read it, a sample of its rows, and the lowest and the highest of each channel.

        What goes into a module that is used several times is none: no division would suit all of it.
        """
        readers: dict[int, list[str]] = defaultdict(list)
        for name, seen in self.latest.items():
            if len(seen) == 1:
                readers[id(seen[0])].append(name)
        for names in readers.values():
            rows = torch.cat(self.rows[names[0]])
            yield names, rows[torch.randperm(len(rows), generator=self.draw)[:ROWS]], *self.ranges[names[0]]

    def _see(self, name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        (vectors, *_) = arguments
        self.latest[name].append(vectors)
        rows = vectors.detach().flatten(0, -2)
        wanted = math.ceil(ROWS * len(vectors) / self.samples)
        self.rows[name].append(rows[torch.randperm(len(rows), generator=self.draw)[:wanted]])
        low, high = torch.aminmax(rows, dim=0)
        if name in self.ranges:
            low, high = torch.minimum(low, self.ranges[name][0]), torch.maximum(high, self.ranges[name][1])
        self.ranges[name] = low, high
