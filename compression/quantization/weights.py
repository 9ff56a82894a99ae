"""Weights of 8 bits, as parametrizations. Each computes what `prunelle.export.quantization` stores."""

import torch
from torch import Tensor, nn

from prunelle.compression.quantization.rounding import UINT8_MAX, round_all, uint8_grid

# 7 of the 8 bits: products of 8 would overflow the 16-bit sums of processors without int8 instructions.
INT8_END = 64


class FakeQuantizer(nn.Module):
    """What rounds a weight, or an input, while it is `enabled`."""

    enabled = True


class Int8Weight(FakeQuantizer):
    """Rounds a matrix to integers of -64 to 64 times a scale for each output: its largest weight / 64.

    Args:
        input_axis: the axis that the products are summed over; 1 in `nn.Linear`, 0 in `Conv1D`.
    """

    def __init__(self, input_axis: int) -> None:
        super().__init__()
        self.input_axis = input_axis

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (outputs, inputs), or the other way round. Returns it rounded."""
        if not self.enabled:
            return weight
        scale = weight.detach().abs().amax(self.input_axis, keepdim=True) / INT8_END
        scale = torch.where(scale >= torch.finfo(scale.dtype).tiny, scale, 1.0)
        return round_all(weight, scale, -INT8_END, INT8_END)


class Int8Table(FakeQuantizer):
    """Rounds a table of embeddings to unsigned integers of 8 bits, with one scale and zero point."""

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (rows, width). Returns it rounded."""
        if not self.enabled:
            return weight
        low, high = torch.aminmax(weight.detach())
        scale, zero = uint8_grid(low.double(), high.double())
        return round_all(weight, scale.to(weight.dtype), -zero.to(weight.dtype), (UINT8_MAX - zero).to(weight.dtype))
