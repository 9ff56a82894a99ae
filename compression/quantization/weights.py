"""Weights of few bits, as parametrizations. Each computes what `prunelle.export.quantization` stores."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from prunelle.compression.quantization.rounding import UINT8_MAX, round_all, scale_signs, uint8_grid

# 7 of the 8 bits: products of 8 would overflow the 16-bit sums of processors without int8 instructions.
INT8_END = 64


class FakeQuantizer(nn.Module):
    """What rounds a weight, or an input, while it is `enabled`."""

    enabled = True
    hook: RemovableHandle  # of one that rounds inputs


class Int8Weight(FakeQuantizer):
    """Rounds a matrix to integers of -64 to 64 times a scale for each output: its largest weight / 64.

    Args:
        input_axis: the axis that the products are summed over; 1 in `nn.Linear`, 0 in `Conv1D`.
        divisors: (inputs,) what the channels of the input are divided by: weights are multiplied by the same before
            they are rounded, and divided by it afterwards. None divides nothing.
    """

    divisors: Tensor | None

    def __init__(self, input_axis: int, divisors: Tensor | None = None) -> None:
        super().__init__()
        self.input_axis = input_axis
        self.register_buffer("divisors", divisors)

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (outputs, inputs), or the other way round. Returns it rounded."""
        if not self.enabled:
            return weight
        if self.divisors is None:
            return _round_symmetric(weight, self.input_axis, INT8_END)
        divisors = self.divisors if self.input_axis == 1 else self.divisors[:, None]
        scale = _symmetric_scale(weight.detach() * divisors, self.input_axis, INT8_END)
        return round_all(weight, scale / divisors, -INT8_END, INT8_END)


class Int4Weight(FakeQuantizer):
    """Rounds a matrix to 16 steps of a scale for each block of an output's weights, as `MatMulNBits` computes.

    Args:
        input_axis: as `Int8Weight` takes it.
        block_size: how many of an output's weights, one after the other, share a scale.
        symmetric: whether the steps are -8 to 7, one end at the weight that is farthest from zero; else they lie from
            the lowest to the highest, and an integer stands for zero.
    """

    def __init__(self, input_axis: int, block_size: int = 32, symmetric: bool = False) -> None:
        super().__init__()
        self.input_axis, self.block_size, self.symmetric = input_axis, block_size, symmetric

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (outputs, inputs), or the other way round. Returns it rounded."""
        if not self.enabled:
            return weight
        matrix = weight.movedim(self.input_axis, 1)
        inputs = matrix.shape[1]
        blocks = functional.pad(matrix, (0, -inputs % self.block_size)).unflatten(1, (-1, self.block_size))
        low, high = torch.aminmax(blocks.detach(), dim=2, keepdim=True)
        if self.symmetric:
            scale = torch.where(high.abs() > low.abs(), high, low) / -8
            lowest, highest = torch.full_like(scale, -8), torch.full_like(scale, 7)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) / 15
            zero = (-low / scale).nan_to_num().round()
            lowest, highest = -zero, 15 - zero
        scale = torch.where(scale == 0, 1.0, scale)
        rounded = round_all(blocks, scale, lowest, highest)
        return rounded.flatten(1)[:, :inputs].movedim(1, self.input_axis)


class TernaryWeight(FakeQuantizer):
    """Makes of each weight a learned scale for its output, with its sign, or zero where it is small.

    Small is what is below 0.7 of the mean magnitude of the output's weights, and the scale begins as the mean of those
    that are not (Ternary Weight Networks, as in TernaryBERT, Zhang et al., arXiv:2009.12812).

    Args:
        weight: where the scale begins.
        input_axis: as `Int8Weight` takes it.
    """

    def __init__(self, weight: Tensor, input_axis: int) -> None:
        super().__init__()
        self.input_axis = input_axis
        signs = self.signs(weight.detach())
        magnitudes = (weight.detach() * signs).sum(input_axis, keepdim=True)
        self.scale = nn.Parameter(magnitudes / signs.abs().sum(input_axis, keepdim=True).clamp(min=1))

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (outputs, inputs), or the other way round."""
        if not self.enabled:
            return weight + 0 * self.scale  # part of the graph: several processes wait for every parameter's gradient
        return scale_signs(weight, self.scale, self.signs(weight.detach()), self.input_axis)

    def signs(self, weight: Tensor) -> Tensor:
        """-1, 0 and 1, of the weight's shape."""
        small = 0.7 * weight.abs().mean(self.input_axis, keepdim=True)
        return weight.sign() * (weight.abs() > small).to(weight.dtype)


class BinaryWeight(TernaryWeight):
    """The same without zeros: the scale begins as the mean magnitude (BinaryBERT, Bai et al., arXiv:2012.15701)."""

    def signs(self, weight: Tensor) -> Tensor:
        """-1 and 1, of the weight's shape."""
        return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)


class Int8Table(FakeQuantizer):
    """Rounds a table of embeddings to unsigned integers of 8 bits, with one scale and zero point."""

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (rows, width). Returns it rounded."""
        if not self.enabled:
            return weight
        low, high = torch.aminmax(weight.detach())
        scale, zero = uint8_grid(low.double(), high.double())
        return round_all(weight, scale.to(weight.dtype), -zero.to(weight.dtype), (UINT8_MAX - zero).to(weight.dtype))


class Int8Rows(FakeQuantizer):
    """Rounds a table of embeddings to integers of -127 to 127 times a scale for each row."""

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (rows, width). Returns it rounded."""
        return _round_symmetric(weight, 1, 127) if self.enabled else weight


def _round_symmetric(weight: Tensor, axis: int, end: int) -> Tensor:
    """To integers from -end to end times a scale, found over one axis."""
    return round_all(weight, _symmetric_scale(weight.detach(), axis, end), -end, end)


def _symmetric_scale(weight: Tensor, axis: int, end: int) -> Tensor:
    scale = weight.abs().amax(axis, keepdim=True) / end
    return torch.where(scale >= torch.finfo(scale.dtype).tiny, scale, 1.0)
