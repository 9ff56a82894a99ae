"""nn_pruning understood: its arguments prune. Nothing else knows what of it is broken.

It need not be installed. What of version 0.1.2 no longer works, on Python 3.11 or later with transformers 5:

- `modules.masked_nn`, and so `patch_coordinator`, is not imported: its dataclasses have defaults that cannot be
  hashed; see `import_patch_coordinator`. `sparse_trainer` is not either: transformers has no `AdamW` any more.
- Models are not compiled: transformers has no `prune_heads` any more.
- Method `magnitude` asks for scores that it does not have, submethod `joint` for ones that its own assertion refuses,
  `1d` on attention for ones of a kind that it does not know; the ampere method `topK` is not made.
- `mask_init` and `mask_scale` are ignored: scores begin at 0.
- Submethod `1d` multiplies scores of rows by scores of columns, which at 0 have no gradient: they never move.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression.activations import GeluToRelu
from prunelle.compression.anatomy import Layer, dissect
from prunelle.compression.method import CompressionMethod
from prunelle.compression.norms import MEMORY, LayerNormToNoNorm
from prunelle.compression.pruning.masks import HIGH, IS_OPEN, LOW
from prunelle.compression.pruning.pruning import Pruning
from prunelle.compression.pruning.schedule import OneShotSchedule
from prunelle.compression.pruning.selection import keep_highest
from prunelle.compression.pruning.structures import UnitGroup, find_groups
from prunelle.compression.replacement import GradualReplacement
from prunelle.errors import InputError

PARTS = ("attention", "dense")  # What has arguments of its own. "dense" is all that is not attention.
RUN = 4  # Of the weights in its ampere patterns, of which two stay.

# What its arguments may be, by what they are by default.
_KINDS: dict[type, Any] = {bool: (bool, int), int: int, float: (int, float), str: str, type(None): str}

_THRESHOLDS = ("threshold", "sigmoied_threshold")  # Methods whose threshold is one of scores.


def import_patch_coordinator() -> Any:
    """nn_pruning's `patch_coordinator`, which Python 3.11 and later refuse to import as it is."""
    with mock.patch("dataclasses.dataclass", functools.partial(dataclasses.dataclass, unsafe_hash=True)):
        from nn_pruning import patch_coordinator
    return patch_coordinator


@dataclasses.dataclass(frozen=True)
class SparseArguments:
    """Its `SparseTrainingArguments`, and their defaults."""

    mask_scores_learning_rate: float = 1e-2
    dense_pruning_method: str = "topK"
    attention_pruning_method: str = "topK"
    ampere_pruning_method: str = "disabled"
    attention_output_with_dense: bool = True
    bias_mask: bool = True
    mask_init: str = "constant"
    mask_scale: float = 0.0
    dense_block_rows: int = 1
    dense_block_cols: int = 1
    attention_block_rows: int = 1
    attention_block_cols: int = 1
    initial_threshold: float = 1.0
    final_threshold: float = 0.5
    initial_warmup: float = 1.0
    final_warmup: float = 2.0
    initial_ampere_temperature: float = 0.0
    final_ampere_temperature: float = 20.0
    regularization: str | None = "disabled"
    regularization_final_lambda: float = 0.0
    attention_lambda: float = 1.0
    dense_lambda: float = 1.0
    distil_teacher_name_or_path: str | None = None
    distil_alpha_ce: float = 0.5
    distil_alpha_teacher: float = 0.5
    distil_temperature: float = 2.0
    final_finetune: bool = False
    layer_norm_patch: bool = False
    layer_norm_patch_steps: int = 50000
    layer_norm_patch_start_delta: float = 0.99
    gelu_patch: bool = False
    gelu_patch_steps: int = 50000
    linear_min_parameters: float = 0.005
    rewind_model_name_or_path: str | None = None

    @staticmethod
    def read(file: Path, **defaults: Any) -> "SparseArguments":
        """What a file says, over the defaults.

        Raises:
            InputError: There is no such file, it is no JSON object, or says what nn_pruning knows nothing about.
        """
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not JSON that can be read: {error}") from error
        if not isinstance(said, dict):
            raise InputError(f"{file} must be an object: nn_pruning's SparseTrainingArguments")
        usual = vars(SparseArguments())
        if unknown := sorted(said.keys() - usual.keys()):
            raise InputError(f"{file} says {unknown[0]}, which is none of nn_pruning's SparseTrainingArguments")
        for name, value in said.items():
            if not isinstance(value, _KINDS[type(usual[name])]) and value != usual[name]:
                raise InputError(f"{file}: {name} cannot be {json.dumps(value)}; by default it is {usual[name]}")
        return SparseArguments(**(defaults | said))

    @property
    def ways(self) -> dict[str, "Way"]:
        """How each of `PARTS` is pruned."""
        return {
            "attention": Way.of(self.attention_pruning_method, self.attention_block_rows, self.attention_block_cols),
            "dense": Way.of(self.dense_pruning_method, self.dense_block_rows, self.dense_block_cols),
        }

    def way_of(self, module: str) -> "Way":
        """How a module is pruned, by its name in a BERT."""
        if module.endswith(("query", "key", "value")):
            return self.ways["attention"]
        if module.endswith("attention.output.dense") and not self.attention_output_with_dense:
            way = self.ways["attention"]
            return dataclasses.replace(way, blocks=way.blocks[::-1])
        return self.ways["dense"]

    def reason_against(self) -> str | None:
        """Why no run here can follow them."""
        ways = self.ways
        if all(way.method == "disabled" for way in ways.values()):
            return "attention_pruning_method and dense_pruning_method are both disabled: nothing would be pruned"
        for part, way in ways.items():
            if way.method == "l0":
                return (
                    f"{part}_pruning_method l0 ends at no density of its own and with gates that are half open: leave "
                    "the file out, and give --score l0 and --density"
                )
            if way.method not in ("disabled", "topK", *_THRESHOLDS):
                return f"{part}_pruning_method {way.method}: nn_pruning has no such method that runs"
            if way.submethod != "default" and (part, way.submethod) != ("dense", "1d_alt"):
                return f"{part}_pruning_method {way.name}: in nn_pruning it fails, or its scores cannot move from 0"
            if way.submethod == "1d_alt" and way.blocks != (1, 1):
                return f"{part}_pruning_method {way.name} prunes dimensions one by one here: its blocks must be 1 x 1"
            if min(way.blocks) < 1:
                return f"{part}_block_rows and {part}_block_cols must be at least 1"
            if way.method == "topK" and not (0 < self.final_threshold <= 1 and self.initial_threshold == 1):
                return (
                    f"topK takes the thresholds for densities: from initial_threshold {self.initial_threshold}, which "
                    f"must be 1, to final_threshold {self.final_threshold}, above 0 and at most 1"
                )
        if self.final_threshold <= 0:
            return f"final_threshold {self.final_threshold} must be above 0"
        if self.mask_scores_learning_rate <= 0:
            return f"mask_scores_learning_rate {self.mask_scores_learning_rate} must be above 0"
        for name in (
            "initial_warmup",
            "final_warmup",
            "regularization_final_lambda",
            "attention_lambda",
            "dense_lambda",
        ):
            if getattr(self, name) < 0:
                return f"{name} {getattr(self, name)} must not be negative"
        if not 0 <= self.linear_min_parameters < 1:
            return f"linear_min_parameters {self.linear_min_parameters} must be a share, from 0 to below 1"
        if self.ampere_pruning_method != "disabled":
            return (
                f"ampere_pruning_method {self.ampere_pruning_method} learns otherwise: --structure 2:4 has a schedule"
            )
        if (self.mask_init, self.mask_scale) != ("constant", 0.0):
            return (
                f"mask_init {self.mask_init} with mask_scale {self.mask_scale} is ignored by nn_pruning, whose scores "
                "begin at 0: say constant and 0"
            )
        if self.distil_teacher_name_or_path is not None and not (
            self.distil_alpha_ce > 0 and self.distil_alpha_teacher >= 0 and self.distil_temperature > 0
        ):
            return "distil_alpha_ce and distil_temperature must be above 0, and distil_alpha_teacher not below"
        if self.regularization not in ("disabled", None, "l1", "l0"):
            return f"regularization {self.regularization} is neither disabled nor l1 nor l0"
        if self.layer_norm_patch and self.layer_norm_patch_start_delta != 1 - 1 / MEMORY:
            return (
                f"layer_norm_patch_start_delta {self.layer_norm_patch_start_delta}: means are forgotten in {MEMORY} "
                f"batches here, which is {1 - 1 / MEMORY}"
            )
        if self.final_finetune:
            return "final_finetune is a run of its own: prune first, then `prunelle finetune` what came out"
        if self.rewind_model_name_or_path is not None:
            return "rewind_model_name_or_path, whose heads are to stay, is not known here: leave it out"
        return None


@dataclasses.dataclass(frozen=True)
class Way:
    """How scores become a mask: by a method, alone or as rows by columns, for blocks of so many rows and columns."""

    method: str
    submethod: str
    blocks: tuple[int, int]

    @staticmethod
    def of(name: str, rows: int, columns: int) -> "Way":
        method, _, submethod = name.partition(":")
        return Way(method, submethod or "default", (rows, columns))

    @property
    def name(self) -> str:
        return f"{self.method}:{self.submethod}"


@dataclasses.dataclass(frozen=True)
class _ThresholdSchedule(OneShotSchedule):
    """nn_pruning's, in its own words: from the first threshold to the last, which is the `density` of `topK` alone.

    Masks go on following the scores once it has come to its end.

    Args:
        initial: The threshold at first.
        warmup, cooldown: Optimizer steps in which it stays at first, and in the end.
        steps: Of the run.
    """

    initial: float
    warmup: float
    cooldown: float
    steps: int

    def __post_init__(self) -> None:
        """Thresholds are checked where the file is read."""

    def at(self, progress: float) -> float:
        step = round(progress * self.steps)
        if step <= self.warmup:
            return self.initial
        if step > self.steps - self.cooldown or self.ends_by(progress):
            return self.density
        rest = 1 - (step - self.warmup) / (self.steps - (self.warmup + self.cooldown))
        return self.density + (self.initial - self.density) * rest**3

    def ends_by(self, progress: float) -> bool:
        return progress >= 1

    def check(self, steps: int) -> None:
        if self.warmup + self.cooldown >= steps:
            raise InputError(
                f"the run has {steps} optimizer steps, too few to prune in: the threshold would stay as it is for "
                f"{self.warmup:g} at first (initial_warmup times --warmup_steps) and for {self.cooldown:g} in the end "
                "(final_warmup times --warmup_steps)"
            )


class SparsePruning(Pruning):
    """Masks as nn_pruning finds them, by scores that are learned from 0 and followed to the end of the run.

    Where it keeps a part of a dimension, so that the number of weights is right, the dimension goes here.

    Args:
        arguments: As `read_arguments` gives them.
        part: One of `PARTS`.
        warmup_steps: As for `methods_of`.
    """

    def __init__(self, arguments: SparseArguments, part: str, warmup_steps: float) -> None:
        super().__init__(
            OneShotSchedule(1.0),  # until the run's length is known
            score_init="zero",
            score_learning_rate=arguments.mask_scores_learning_rate,
        )
        self.arguments, self.part, self.warmup_steps = arguments, part, warmup_steps
        self.way = arguments.ways[part]

    def start(self, steps: int) -> None:
        one = int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(steps * self.warmup_steps)
        self.schedule = _ThresholdSchedule(
            self.arguments.final_threshold,
            self.arguments.initial_threshold,
            self.arguments.initial_warmup * one,
            self.arguments.final_warmup * one,
            steps,
        )
        super().start(steps)

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.arguments)

    def penalty(self) -> Tensor | float:
        mode = self.arguments.regularization
        if self.frozen or mode not in ("l1", "l0"):
            return 0.0
        weight = {"attention": self.arguments.attention_lambda, "dense": self.arguments.dense_lambda}[self.part] * 0.5
        weight *= self.arguments.regularization_final_lambda * self.density / self.arguments.final_threshold
        learned = [scores + (IS_OPEN if mode == "l0" else 0.0) for scores in self._learned().values()]
        return weight * sum(scores.sigmoid().mean() for scores in learned) / len(learned)

    def metrics(self) -> dict[str, float]:
        (density,) = super().metrics().values()
        return {f"density_{self.part}": density}

    def _select(self, scores: list[Tensor], density: float) -> list[Tensor]:
        return [self.kept(group.group, one, density) for one, group in zip(scores, self.groups, strict=True)]

    def _count(self, name: str, total: int) -> int:
        (group,) = [group for group in self.groups if group.group.name == name]
        return int(self.kept(group.group, group.ranking(), self.arguments.final_threshold).sum())

    def kept(self, group: UnitGroup, scores: Tensor, threshold: float) -> Tensor:
        times = 1
        if self.way.submethod == "1d_alt":  # there a dimension's score is that of all of its weights in a matrix
            layout = next(iter(group.layouts.values()))
            times = math.prod(layout.view) // math.prod(layout.units)
        return kept(scores, self.way.method, threshold, self.arguments.linear_min_parameters, times)

    def _find_groups(self, model: PreTrainedModel) -> list[UnitGroup]:
        structures: dict[str, dict[str, nn.Module]] = {}
        for layer in dissect(model):
            for structure, modules in self._structures(layer):
                structures.setdefault(structure, {}).update(modules)
        groups = [
            group for structure, modules in structures.items() for group in find_groups(model, structure, modules)
        ]
        if self.way.method == "topK":
            for group in groups:
                if not int(self.arguments.final_threshold * group.count):
                    raise InputError(
                        f"final_threshold {self.arguments.final_threshold} keeps none of {group.name}, {group.count} "
                        "in number"
                    )
        return [dataclasses.replace(group, masks_biases=self.arguments.bias_mask) for group in groups]

    def _structures(self, layer: Layer) -> Iterator[tuple[str, dict[str, nn.Module]]]:
        """What of a layer is this part, and how it is pruned."""
        rows, columns = self.way.blocks
        by_dimensions = self.way.submethod == "1d_alt"
        output = dict([layer.heads.consumer])
        if self.part == "attention":
            yield _blocks(rows, columns), dict(layer.heads.producers)
            if not self.arguments.attention_output_with_dense:
                yield _blocks(columns, rows), output
            return
        yield "ffn" if by_dimensions else _blocks(rows, columns), {**layer.ffn.producers, **dict([layer.ffn.consumer])}
        if self.arguments.attention_output_with_dense:
            yield "columns" if by_dimensions else _blocks(rows, columns), output


class _Patch(GradualReplacement):
    """Modules that are replaced after so many steps."""

    def __init__(self, patch_steps: int) -> None:
        super().__init__(0.0, 0.0)
        self.patch_steps = patch_steps

    def start(self, steps: int) -> None:
        if not 0 < self.patch_steps <= steps:
            raise InputError(
                f"{self.old} is to be {self.new} after {self.patch_steps} steps, and the run has {steps} optimizer "
                f"steps: say {steps} at most"
            )
        self.cooldown = 1 - self.patch_steps / steps


class _GeluPatch(_Patch, GeluToRelu):
    """Its `gelu_patch`."""


class _LayerNormPatch(_Patch, LayerNormToNoNorm):
    """Its `layer_norm_patch`, with running means that are not computed number for number as there."""


def _blocks(rows: int, columns: int) -> str:
    return "weights" if (rows, columns) == (1, 1) else f"{rows}x{columns}"


def read_arguments(file: Path) -> SparseArguments:
    """nn_pruning's `SparseTrainingArguments`, which `methods_of` is to follow.

    Raises:
        InputError: There is no such file, or it asks for what cannot be done here.
    """
    arguments = SparseArguments.read(file)
    if reason := arguments.reason_against():
        raise InputError(f"{file}: {reason}")
    return arguments


def methods_of(arguments: SparseArguments, warmup_steps: float) -> list[CompressionMethod]:
    """What prunes a model, of any architecture that `dissect` knows, to the masks that nn_pruning would have.

    Args:
        arguments: As `read_arguments` gives them.
        warmup_steps: Of the learning rate, which its schedule counts in: steps, or below 1 a share of the run.
    """
    methods: list[CompressionMethod] = [
        SparsePruning(arguments, part, warmup_steps) for part in PARTS if arguments.ways[part].method != "disabled"
    ]
    if arguments.gelu_patch:
        methods.append(_GeluPatch(arguments.gelu_patch_steps))
    if arguments.layer_norm_patch:
        methods.append(_LayerNormPatch(arguments.layer_norm_patch_steps))
    return methods


def kept(scores: Tensor, method: str, threshold: float, least: float, times: int = 1) -> Tensor:
    """What of (…) scores, each of which counts so many times, stays: 1 or 0, of `l0` anything between."""
    count = scores.numel() * times
    if method == "topK":
        return keep_highest(scores, int(threshold * count) // times)
    if method == "l0":
        return (scores.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
    if method not in _THRESHOLDS:
        raise InputError(f"nn_pruning has no method {method} that runs")
    kept = (scores.sigmoid() if method == "sigmoied_threshold" else scores) > threshold
    fewest = int(least * count) + 1 if least else 0
    if kept.sum() * times >= fewest:
        return kept
    rank = -(-max(count - fewest, 1) // times)
    return scores > scores.flatten().kthvalue(rank).values
