"""What every loss here does alike: the precision it computes in and the number it divides by."""

import torch
from torch import Tensor, float64


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision raised to float32 (a softmax over a vocabulary loses too much below); float64 kept."""
    return tensor if tensor.dtype == float64 else tensor.float()


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which products of matrices on the tensor's device keep the precision of their factors."""
    return torch.autocast(tensor.device.type, enabled=False)


def at_least_one(num_items: Tensor | int | None, default: Tensor | int) -> Tensor | int:
    """The divisor of a sum: `num_items`, else `default`; never 0, so that an empty sum is 0 and not NaN."""
    divisor = default if num_items is None else num_items
    return divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1)
