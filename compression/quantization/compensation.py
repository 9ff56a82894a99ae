"""A matrix rounded input by input, where weights whose turn is still to come make up for what has been lost."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunelle.compression.hooks import hooked

BLOCK = 128  # inputs that are rounded before the rest of the matrix is told
DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, added to it


@torch.no_grad()
def compensated(weight: Tensor, gram: Tensor, end: int) -> Tensor:
    """A matrix that loses little of its products by being rounded: GPTQ (arXiv:2210.17323).

    Rounded it is to integers times a scale for each output, its largest weight / `end`. Inputs have their turn by size,
    and each weight is returned as it is rounded at its turn, not rounded: training can go on from there. The largest of
    an output stays, and none becomes larger, so that scales are those of the matrix that was given. Zeros stay: they
    may have been pruned.

    Args:
        weight: (outputs, inputs)
        gram: (inputs, inputs) the sum of x xᵀ over inputs x.
        end: the largest integer.

    Returns:
        (outputs, inputs)
    """
    order = gram.diagonal().argsort(descending=True)
    left = weight[:, order].double()
    largest = left.abs().amax(1)
    scale = torch.where(largest > 0, largest / end, 1.0)
    given, stays = left.clone(), (left == 0) | (left.abs() == largest[:, None])

    gram = gram[order][:, order].double()
    gram.diagonal().add_(DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(weight.dtype).tiny))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)

    found = torch.empty_like(left)
    for start in range(0, left.shape[1], BLOCK):
        stop = min(start + BLOCK, left.shape[1])
        losses = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            weights = torch.where(stays[:, column], given[:, column], left[:, column].clamp(-largest, largest))
            found[:, column] = weights
            rounded = (weights / scale).round() * scale
            losses[:, column - start] = (left[:, column] - rounded) / inverse[column, column]
            left[:, column:stop] -= losses[:, column - start, None] * inverse[column, column:stop]
        left[:, stop:] -= losses @ inverse[start:stop, stop:]
    return found[:, order.argsort()].to(weight.dtype)


@contextmanager
def gram_matrices(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Gathers what `compensated` needs of the inputs of linear modules.

    Yields:
        By name (inputs, inputs) float32, of those that are run.
    """
    grams: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        rows = arguments[0].detach().flatten(0, -2).float()
        with torch.autocast(rows.device.type, enabled=False):
            gram = rows.T @ rows
        grams[name] = grams[name].add_(gram) if name in grams else gram

    hooks = [module.register_forward_pre_hook(partial(add, name)) for name, module in modules.items()]
    with hooked(hooks):
        yield grams
