"""The highest scores, counted out exactly."""

import numpy as np
import torch
from torch import Tensor


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Marks exactly so many of the highest scores; of equal ones, those that come first.

    The scores are not sorted: the lowest kept is found by partition, linear in their number. On a GPU the host
    waits for nothing.

    Args:
        scores: of any shape, none of them NaN.
        count: how many to keep, from 0 to their number.

    Returns:
        True where kept, of the scores' shape.
    """
    flat = scores.detach().flatten()
    if count <= 0 or count >= flat.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    lowest = _at_rank(flat, flat.numel() - count)
    mask = flat > lowest
    ties = flat == lowest
    left = count - mask.sum()
    if flat.is_cpu and ties.sum() == left:  # nearly always, and cheaper than to number the ties
        mask |= ties
    else:
        mask |= ties & (ties.cumsum(0) <= left)
    return mask.view_as(scores)


def _at_rank(flat: Tensor, rank: int) -> Tensor:
    """The element that would stand at a place, counted from 0, if they were sorted in ascending order."""
    if not flat.is_cpu:
        return flat.kthvalue(rank + 1).values
    array = (flat if flat.dtype in (torch.float32, torch.float64) else flat.float()).numpy()
    return torch.as_tensor(np.partition(array, rank)[rank], dtype=flat.dtype)
