"""Several processes that train one model."""

from collections.abc import Iterable

import torch
from torch import Tensor


def agree(tensors: Iterable[Tensor]) -> None:
    """Have all processes go on with the numbers of the first: sums that differ in the last bit can round otherwise."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), 0)
