"""What is kept or pruned as one: single weights, blocks, rows, columns, heads, feed-forward dimensions."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelle.compression.anatomy import Units, dissect, matrix
from prunelle.errors import InputError

SHARED = ("heads", "ffn")  # units that lie on several weights
LAYERS = "layers"

# Whether the outputs and the inputs of a matrix are units of their own.
_COUNTED = {"weights": (True, True), "rows": (True, False), "columns": (False, True)}


@dataclass(frozen=True)
class Axis:
    """A part of a matrix's height or width.

    Args:
        size: how many places it has.
        counts: whether each of them belongs to another unit, or all to the same.
    """

    size: int
    counts: bool


@dataclass(frozen=True)
class Layout:
    """How units lie on a weight: a mask of a number a unit, broadcast to the weight's `view`, covers it.

    Args:
        outputs: what the dimension of a linear module's outputs is split into.
        inputs: what that of its inputs is split into.
        is_transposed: whether the weight is stored as (inputs, outputs), as GPT-2's are.
    """

    outputs: tuple[Axis, ...]
    inputs: tuple[Axis, ...]
    is_transposed: bool

    @property
    def view(self) -> tuple[int, ...]:
        """The weight's shape, split."""
        return tuple(axis.size for axis in self._axes)

    @property
    def units(self) -> tuple[int, ...]:
        """The mask's shape: of the view where units differ, else 1."""
        return tuple(axis.size if axis.counts else 1 for axis in self._axes)

    @property
    def has_rows(self) -> bool:
        """Whether rows can go while others stay, and biases with them."""
        return any(axis.counts for axis in self.outputs)

    @property
    def of_bias(self) -> "Layout":
        """How the rows lie on the bias."""
        return Layout(self.outputs, (), False)

    def rows(self, mask: Tensor) -> Tensor:
        """Where anything of a row is left: from a mask of shape `units` one for the bias."""
        first = 0 if self.is_transposed else len(self.outputs)
        return mask.amax([first + place for place in range(len(self.inputs))])

    def gather(self, values: Tensor) -> Tensor:
        """The sum over the weights of each unit: (units,), from values of the weight's shape."""
        return values.reshape(self.view).sum_to_size(self.units).flatten()

    @property
    def _axes(self) -> tuple[Axis, ...]:
        return self.inputs + self.outputs if self.is_transposed else self.outputs + self.inputs


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind, with a score each, that lie on one weight or on several.

    Args:
        name: of the module, or of the layer whose weights share them.
        layouts: by qualified name of the module. The units stand in the same order in all of them.
        pattern: for N:M, how many of each run of weights along the inputs stay, and the run's length; it is the last
            part of the inputs.
        offsets: (units,) what is added to scores: infinite for units that are to stay, or to go, whatever their score.
        masks_biases: whether the bias of a row goes with the last of its weights; by default not where weights go one
            by one.
    """

    name: str
    layouts: dict[str, Layout]
    pattern: tuple[int, int] | None = None
    offsets: Tensor | None = None
    masks_biases: bool | None = None

    def __post_init__(self) -> None:
        if self.masks_biases is None:
            object.__setattr__(self, "masks_biases", self.size > 1)

    @property
    def count(self) -> int:
        """How many units there are."""
        return math.prod(next(iter(self.layouts.values())).units)

    @property
    def size(self) -> int:
        """How many weights one unit has."""
        return sum(math.prod(layout.view) // math.prod(layout.units) for layout in self.layouts.values())

    @property
    def row_length(self) -> int:
        """How many inputs its one matrix has."""
        (layout,) = self.layouts.values()
        return math.prod(axis.size for axis in layout.inputs)

    def lift(self, scores: Tensor) -> Tensor:
        """Scores of shape (units,) as they are ranked: for N:M, those that the pattern keeps above all others.

        While density falls from 1 to N/M the others go one by one, so that the end is the pattern itself.
        """
        if self.offsets is not None:
            scores = scores + self.offsets.to(scores)
        if self.pattern is None:
            return scores
        runs, axis = self._runs(scores)
        best = runs.argsort(dim=axis, descending=True, stable=True).narrow(axis, 0, self.pattern[0])
        return runs.scatter(axis, best, torch.inf).flatten()

    def follows_pattern(self, kept: Tensor) -> bool:
        """Whether every run has its number of units: always, but for N:M."""
        if self.pattern is None:
            return True
        runs, axis = self._runs(kept)
        return bool((runs.sum(axis) == self.pattern[0]).all())

    def _runs(self, values: Tensor) -> tuple[Tensor, int]:
        """Values of shape (units,) so that the runs of a pattern lie along one axis, and that axis."""
        (layout,) = self.layouts.values()
        return values.view(layout.view), 1 if layout.is_transposed else -1


def find_groups(model: PreTrainedModel, structure: str, modules: Mapping[str, nn.Module]) -> list[UnitGroup]:
    """Finds the units of a model.

    Args:
        model: of any architecture; for heads and feed-forward dimensions one that `dissect` knows.
        structure: `weights`; `RxC`, such as `32x32`: blocks of R outputs by C inputs; `rows`, of all weights of an
            output; `columns`, of an input; `N:M`, such as `2:4`: of M weights in a row N stay; `heads`: queries, keys
            and values of a head and what reads them; `ffn`: dimensions of the feed-forward network, in all of its
            matrices.
        modules: the linear modules that may be pruned, by qualified name. `heads` and `ffn` take those that make or
            read such units, everything else takes all.

    Raises:
        InputError: there is no such structure, a block or pattern does not divide a matrix, a unit lies partly in
            modules that may not be pruned, or none is found.
    """
    check_structure(structure)
    if structure in SHARED:
        return _shared_groups(model, structure, modules)
    return [
        UnitGroup(name, {name: _layout(name, module, structure)}, _numbers(structure, ":"))
        for name, module in modules.items()
    ]


def check_structure(structure: str) -> None:
    """See that there is such a structure.

    Raises:
        InputError: there is none.
    """
    block, pattern = _numbers(structure, "x"), _numbers(structure, ":")
    is_block = block is not None and min(block) > 0
    is_pattern = pattern is not None and 0 < pattern[0] < pattern[1]
    if not (structure in (*_COUNTED, *SHARED, LAYERS) or is_block or is_pattern):
        known = ", ".join((*_COUNTED, *SHARED, LAYERS))
        raise InputError(f"no structure {structure}: give {known}, blocks as 32x32, or a pattern as 2:4")


def pattern_density(structure: str) -> float | None:
    """What an N:M pattern keeps; None for every other structure."""
    pattern = _numbers(structure, ":")
    return None if pattern is None else pattern[0] / pattern[1]


def _layout(name: str, module: nn.Module, structure: str) -> Layout:
    """How the units of a matrix that shares none lie on it."""
    rows, columns = matrix(module).shape
    by_row, by_column = _COUNTED.get(structure, (True, True))
    outputs: tuple[Axis, ...] = (Axis(rows, by_row),)
    inputs: tuple[Axis, ...] = (Axis(columns, by_column),)
    if block := _numbers(structure, "x"):
        outputs = (Axis(rows // block[0], True), Axis(block[0], False))
        inputs = (Axis(columns // block[1], True), Axis(block[1], False))
    elif pattern := _numbers(structure, ":"):
        block = (1, pattern[1])
        inputs = (Axis(columns // pattern[1], True), Axis(pattern[1], True))
    if block and (rows % block[0] or columns % block[1]):
        raise InputError(
            f"{structure} does not divide {name}, which has {rows} outputs and {columns} inputs: choose numbers that "
            "do, or exclude it"
        )
    return Layout(outputs, inputs, isinstance(module, Conv1D))


def _shared_groups(model: PreTrainedModel, structure: str, modules: Mapping[str, nn.Module]) -> list[UnitGroup]:
    """Heads, or feed-forward dimensions, of every layer that has some."""
    groups = []
    for layer in dissect(model):
        units: Units = getattr(layer, structure)
        if not units.count:
            continue
        everything = {**units.producers, units.consumer[0]: units.consumer[1]}
        left_out = [name for name in everything if name not in modules]
        if len(left_out) == len(everything):
            continue
        if left_out:
            raise InputError(
                f"the {structure} of {layer.name} lie in {len(everything)} modules, of which {left_out[0]} is not to "
                "be pruned: choose all of them or none"
            )
        units_of = (Axis(units.count, True), Axis(units.size, False))
        layouts = {
            name: Layout((Axis(units.parts, False), *units_of), _whole(module, 1), isinstance(module, Conv1D))
            for name, module in units.producers.items()
        }
        name, module = units.consumer
        layouts[name] = Layout(_whole(module, 0), units_of, isinstance(module, Conv1D))
        groups.append(UnitGroup(f"{layer.name} {structure}", layouts))
    if not groups:
        raise InputError(f"none of the modules to prune makes or reads {structure}")
    return groups


def _whole(module: nn.Module, side: int) -> tuple[Axis, ...]:
    return (Axis(matrix(module).shape[side], False),)


def _numbers(structure: str, separator: str) -> tuple[int, int] | None:
    """R and C of RxC, or N and M of N:M."""
    found = re.fullmatch(rf"(\d+){separator}(\d+)", structure)
    return None if found is None else (int(found[1]), int(found[2]))
