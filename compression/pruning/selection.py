"""The highest scores, counted out exactly."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAMPLED = 1 << 16  # From so many scores on, a sample says where to look.
STRIDE = 61  # Of the sample: prime, so that it does not fall on the same columns of a matrix all the time.


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Marks exactly so many of the highest scores; of equal ones, those that come first.

    Nothing is sorted: the time is linear in the number of scores. On a GPU the host waits for nothing.

    Args:
        scores: of any shape, none of them NaN.
        count: how many to keep, from 0 to their number.

    Returns:
        True where kept, of the scores' shape.
    """
    return keep_highest_of_all([scores], count)[0]


def keep_highest_of_each(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """`keep_highest` of several tensors, on as many threads as PyTorch may use."""
    if not scores[0].is_cpu:
        return [keep_highest(part, count) for part, count in zip(scores, counts, strict=True)]
    return _in_threads(keep_highest, scores, counts)


def keep_highest_of_all(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Marks the highest of several tensors taken together; of equal ones those that come first.

    Args:
        scores: all on one device and of one dtype, otherwise as for `keep_highest`.
        count: how many to keep, from 0 to the number of all.

    Returns:
        True where kept, of the scores' shapes.
    """
    if count <= 0 or count >= sum(part.numel() for part in scores):
        return [torch.full_like(part, count > 0, dtype=torch.bool) for part in scores]
    flat = [part.detach().flatten() for part in scores]
    kept = _on_cpu(flat, count) if flat[0].is_cpu else _on_gpu(flat, count)
    return [mask.view(part.shape) for mask, part in zip(kept, scores, strict=True)]


def keep_highest_in_rows(scores: Tensor, count: int, dim: int) -> Tensor:
    """Marks so many of the highest scores of every line along a dimension; of equal ones, those that come first.

    Returns:
        True where kept, of the scores' shape.
    """
    best = scores.argsort(dim=dim, descending=True, stable=True).narrow(dim, 0, count)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(dim, best, True)


def _on_gpu(flat: list[Tensor], count: int) -> Sequence[Tensor]:
    together = torch.cat(flat)
    lowest = together.kthvalue(together.numel() - count + 1).values
    mask, ties = together > lowest, together == lowest
    return (mask | (ties & (ties.cumsum(0) <= count - mask.sum()))).split([part.numel() for part in flat])


def _on_cpu(flat: list[Tensor], count: int) -> list[Tensor]:
    arrays = [(part if part.dtype in (torch.float32, torch.float64) else part.float()).numpy() for part in flat]
    lowest = _at_rank(arrays, sum(array.size for array in arrays) - count)
    masks = _in_threads(lambda array: array >= lowest, arrays)
    surplus = sum(map(np.count_nonzero, masks)) - count
    for mask, array in zip(reversed(masks), reversed(arrays), strict=True):
        if surplus > 0:
            last_ties = np.flatnonzero(array == lowest)[-surplus:]
            mask[last_ties] = False
            surplus -= last_ties.size
    return [torch.from_numpy(mask) for mask in masks]


def _at_rank(arrays: list[Any], rank: int) -> Any:
    """The number that would stand at a place, counted from 0, if those of all arrays were sorted in ascending order.

    Of many, those are counted that lie below a band around the place, and those in it partitioned. A sample says where
    the band is; should the place lie outside of it after all, everything is partitioned.
    """
    total = sum(array.size for array in arrays)
    if total >= SAMPLED:
        sample = np.sort(np.concatenate([array[::STRIDE] for array in arrays]))
        place, margin = rank * sample.size // total, 2 * math.isqrt(sample.size)  # four standard errors
        low, high = sample[max(place - margin, 0)], sample[min(place + margin, sample.size - 1)]
        below = sum(_in_threads(lambda array: np.count_nonzero(array < low), arrays))
        band = np.concatenate(_in_threads(lambda array: array[(array >= low) & (array <= high)], arrays))
        if below <= rank < below + band.size:
            return np.partition(band, rank - below)[rank - below]
    return np.partition(np.concatenate(arrays), rank)[rank]


def _in_threads(function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """What `map` gives. NumPy uses one thread a call, and lets others run meanwhile."""
    threads = min(torch.get_num_threads(), len(arguments[0]))
    if threads == 1:
        return list(map(function, *arguments))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, *arguments))
