"""Inputs of linear modules whose channels differ in size, evened out before all of a tensor shares one scale.

Some channels of a transformer's activations are many times as large as the others, which one scale for all then leaves
with few steps. Dividing each channel by a number and multiplying the weights that read it by the same one changes
nothing but what is lost by rounding: SmoothQuant (arXiv:2211.10438). Training takes powers of two, which a float is
multiplied by without any rounding, so that file and simulation stay exactly alike.
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

# How the size of a channel is shared between input and weights: all left to the weights at 1.
EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WORTH = 0.5  # the share of the error that may be left where a channel is divided for it
ROWS = 1024  # of each input, on which the error is measured
SMALLEST = 1e-3  # what channels that hardly ever differ from zero are taken for, of the largest


@torch.no_grad()
def channel_divisors(
    rows: Tensor, low: Tensor, high: Tensor, weight: Tensor, *, powers_of_two: bool = False
) -> Tensor | None:
    """What to divide the channels of an input by, None where that does not halve the error.

    The numbers are `max|x|^a / max|w|^(1-a)` of each channel, as in SmoothQuant; `a` is chosen by the mean squared
    error that rounding leaves in the products.

    Args:
        rows: (rows, channels) of the input.
        low, high: (channels,) the range of each channel.
        weight: (outputs, channels) all that reads the input.
        powers_of_two: whether to take the nearest of those. (Logits of two models were then 5 to 17 % further from
            float32's.)

    Returns:
        (channels,)
    """
    size, reader = _floored(torch.maximum(-low, high)), _floored(weight.abs().amax(0))
    candidates = [size**exponent / reader ** (1 - exponent) for exponent in EXPONENTS]
    if powers_of_two:
        candidates = [divisors.log2().round().exp2() for divisors in candidates]
    exact = rows @ weight.T
    before, *errors = [
        _error(rows, low, high, weight, divisors, exact) for divisors in (torch.ones_like(size), *candidates)
    ]
    least = min(range(len(errors)), key=errors.__getitem__)
    return candidates[least] if errors[least] < WORTH * before else None


def _floored(sizes: Tensor) -> Tensor:
    return sizes.clamp(min=SMALLEST * sizes.max().item() or 1.0)


def _error(rows: Tensor, low: Tensor, high: Tensor, weight: Tensor, divisors: Tensor, exact: Tensor) -> float:
    """Mean squared, of the products of rounded rows with the rounded matrix."""
    scale, zero = uint8_grid((low / divisors).min(), (high / divisors).max())
    rounded = round_within(rows, scale * divisors, -zero, UINT8_MAX - zero)
    return (rounded @ Int8Weight(1, divisors)(weight).T - exact).square().mean().item()


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
