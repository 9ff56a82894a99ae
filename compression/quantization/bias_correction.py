"""Biases that take back what rounding shifts on average, one module after the other (arXiv:1906.04721, section 4.2)."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunelle.compression.hooks import hooked


@contextmanager
def output_means(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Takes note of what linear modules put out.

    Yields:
        By name, for each call (outputs,), the mean over the rows.
    """
    means: dict[str, list[Tensor]] = defaultdict(list)

    def see(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        means[name].append(_mean(output))

    hooks = [module.register_forward_hook(partial(see, name)) for name, module in modules.items()]
    with hooked(hooks):
        yield means


@contextmanager
def correcting_biases(modules: Mapping[str, nn.Module], means: Mapping[str, Sequence[Tensor]]) -> Iterator[None]:
    """While the same examples are run again, rounded, moves biases until outputs have the means that they had.

    A bias becomes the average of what it lacked in each call. A call's correction is in its own output already, so that
    modules further on are corrected for what is left, and one run does for all.

    Args:
        modules: linear, by name. Those without a bias stay as they are.
        means: as `output_means` yields them.
    """
    calls: Counter[str] = Counter()

    @torch.no_grad()
    def correct(name: str, module: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        lacking = means[name][calls[name]] - _mean(output)
        calls[name] += 1
        correction = lacking / calls[name]
        module.bias.add_(correction)
        return output + correction.to(output.dtype)

    biased = {name: module for name, module in modules.items() if getattr(module, "bias", None) is not None}
    hooks = [module.register_forward_hook(partial(correct, name)) for name, module in biased.items()]
    with hooked(hooks):
        yield


def _mean(output: Tensor) -> Tensor:
    return output.detach().flatten(0, -2).float().mean(0)
