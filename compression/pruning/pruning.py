"""Pruning while training: masks that follow the scores on a schedule, and stay once the density is reached."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from prunelle.compression.method import CompressionMethod, RunOnExamples
from prunelle.compression.processes import agree
from prunelle.compression.pruning.calibration import gate_gradients, input_norms
from prunelle.compression.pruning.layers import gate_layers
from prunelle.compression.pruning.masks import IS_OPEN, HardConcreteMask, Mask, WandaMask
from prunelle.compression.pruning.schedule import OneShotSchedule
from prunelle.compression.pruning.selection import keep_highest_in_rows, keep_highest_of_all, keep_highest_of_each
from prunelle.compression.pruning.structures import LAYERS, UnitGroup, check_structure, find_groups, pattern_density
from prunelle.compression.pruning.targets import find_prunable
from prunelle.compression.pruning.unit_masks import CALIBRATED, LEARNED, UnitMasks
from prunelle.errors import InputError

Score = Literal["magnitude", "movement", "soft_movement", "l0", "taylor", "wanda", "head_importance", "random"]
Ranking = Literal["row", "tensor", "global"]


class Pruning(CompressionMethod):
    """Masks the units of linear modules that have the lowest scores.

    Scores:

    - `magnitude`: |w|. Masked weights get no gradient of the loss, and can come back; weight decay and what the
      optimizer remembers still move them.
    - `movement`: learned by a straight-through gradient (arXiv:2005.07683); see `LearnedMask`.
    - `soft_movement`: the same, kept where the sigmoid of the score is above one threshold for the whole model, and a
      penalty on the sigmoids' mean. Published, the threshold stays and the penalty's weight is tuned until the
      density fits; here the threshold goes where the density is the one asked for.
    - `l0`: how often a random gate on the weight is open (arXiv:1712.01312), with a penalty on the share of gates that
      are; see `HardConcreteMask`. Here too the density is the one asked for: what is not kept is closed, what is kept
      is open from the end of the schedule on.
    - `taylor`: |w dL/dw|, to first order what the loss would change by if the weight were 0 (arXiv:1906.10771): a
      running mean over optimizer steps, of gradients as `observe` finds them (the trainers' are clipped by then). What
      is masked gets no gradient, and its score fades.
    - `wanda`: |w| times the norm of the input that it is multiplied by, over examples (arXiv:2306.11695).
    - `head_importance`: of `heads` alone, how the loss of an example changes with a gate on what the head gives, in
      absolute value and added up over examples, divided by the norm over the layer (arXiv:1905.10650).
    - `random`: drawn once, the baseline.

    A unit of several weights has one learned or random score, the mean of its weights' magnitudes, or |sum of w dL/dw|.
    Several methods prune one model, each another structure of other modules: what one has masked is no longer there for
    the next.

    Args:
        schedule: The target density, the share of units kept, and the way there.
        score: As above.
        structure: What is a unit: `weights` and others, as `find_groups` takes them. The bias of a row goes with the
            last of its weights, but where weights go one by one.
        ranking: Whether each `row` (the weights of one output) keeps the share of its weights, each `tensor` that of
            its own units (each layer, of heads and feed-forward dimensions), or the `global` order decides how much of
            each is kept. By default `tensor`, for soft movement and L0 `global`, for Wanda `row` where weights go one
            by one.
        score_init: Where learned scores begin: `magnitude`, |w| / std(w), so that the first masks are those of
            magnitude pruning and the scores of all tensors are of one scale; `zero`, as published; `noise`: normal,
            of standard deviation 0.01.
        score_learning_rate: Of learned scores, which know no weight decay.
        score_penalty: Weight of the mean sigmoid of learned scores in the loss, for L0 of the expected share of
            open gates. By default 1 for soft movement and L0, and 0 for movement.
        calibration_samples: How many examples are looked at before the first step, where the score wants some.
        patterns, excluded: As `find_prunable` takes them. Layers are pruned whole.
        pruned_layers: Of `layers`, those that are to go; the schedule's density is then that of the others.
        seed: Of random scores and of noise.

    Attributes:
        groups: The masked units, once attached.
        density: What the masks keep now.
        frozen: Whether the target has been reached; masks then stay as they are.

    Raises:
        InputError: There is no such structure, or an N:M pattern and a density other than N / M; rows are ranked and
            weights do not go one by one; the score does not fit the structure or the schedule.
    """

    def __init__(
        self,
        schedule: OneShotSchedule,
        score: Score = "movement",
        *,
        structure: str = "weights",
        ranking: Ranking | None = None,
        score_init: Literal["magnitude", "zero", "noise"] = "magnitude",
        score_learning_rate: float = 1e-2,
        score_penalty: float | None = None,
        calibration_samples: int = 128,
        patterns: Sequence[str] = (),
        excluded: Sequence[str] = (),
        pruned_layers: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        check_structure(structure)
        if (density := pattern_density(structure)) is not None:
            if not math.isclose(density, schedule.density, rel_tol=0.01):
                raise InputError(f"{structure} keeps a density of {density:g}, and {schedule.density:g} was asked for")
            schedule = replace(schedule, density=density)
        if score in LEARNED and schedule.at(0.0) < 1:
            raise InputError(f"{score} scores are learned in training, and this schedule prunes before it")
        if score == "head_importance" and structure != "heads":
            raise InputError(f"head_importance ranks heads, not {structure}")
        if ranking == "row" and structure != "weights":
            raise InputError(f"rows are ranked where weights go one by one, not for {structure}")
        if structure == LAYERS and score == "magnitude" and not pruned_layers:
            raise InputError("layers have no magnitude: choose another score, or say which are to go")
        if structure == LAYERS and score == "wanda":
            raise InputError("layers have no inputs that wanda could measure: choose another score")
        self.schedule, self.score, self.structure, self.score_init = schedule, score, structure, score_init
        usual = "global" if score in ("soft_movement", "l0") else "tensor"
        self.ranking = ranking or ("row" if score == "wanda" and structure == "weights" else usual)
        self.score_learning_rate = score_learning_rate
        self.score_penalty = score_penalty if score_penalty is not None else float(score in ("soft_movement", "l0"))
        self.calibration_samples, self.is_calibrated = calibration_samples, False
        self.patterns, self.excluded, self.pruned_layers, self.seed = patterns, excluded, pruned_layers, seed
        self.groups: list[UnitMasks] = []
        self.density, self.frozen = 1.0, False

    @property
    def masks(self) -> dict[str, Mask]:
        """By the qualified name of their weight, once attached."""
        return {name: mask for group in self.groups for name, mask in group.masks.items()}

    def attach(self, model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        groups = self._find_groups(model)
        total = sum(group.count for group in groups)
        if not round(self.schedule.density * total):
            raise InputError(
                f"a density of {self.schedule.density} keeps none of {total} {self.structure}: give {1 / total:.2g} at "
                "least"
            )
        for group in groups:
            if self.ranking == "tensor" and not round(self.schedule.density * group.count):
                raise InputError(
                    f"a density of {self.schedule.density} keeps none of {group.name}, {group.count} in number: "
                    f"give {1 / group.count:.2g} at least, or rank them globally"
                )
            if self.ranking == "row" and not round(self.schedule.density * group.row_length):
                raise InputError(
                    f"a density of {self.schedule.density} keeps none of the {group.row_length} weights in a row of "
                    f"{group.name}: give {1 / group.row_length:.2g} at least, or rank each tensor"
                )
        score_init = "zero" if self.structure == LAYERS else self.score_init
        self.groups = [UnitMasks(model, group, self.score, score_init, generator) for group in groups]
        _keep_from_broadcasts(model)

    def start(self, steps: int) -> None:
        self.schedule.check(steps)

    def calibrate(self, model: PreTrainedModel, run: RunOnExamples) -> None:
        if self.score == "wanda":
            modules = {name: module for group in self.groups for name, module in group.modules.items()}
            with input_norms(model, modules) as norms:
                run(self.calibration_samples, None)
            for name, mask in self.masks.items():
                assert isinstance(mask, WandaMask)
                mask.norms.copy_(norms[name.removesuffix(".weight")].view_as(mask.norms))
        elif self.score == "head_importance":
            readers = {g.group.name: (list(g.modules.values())[-1], g.group.count) for g in self.groups}
            with gate_gradients(readers) as sums:
                run(self.calibration_samples, lambda: None)
            for group in self.groups:
                group.set_scores(sums[group.group.name] / sums[group.group.name].norm().clamp(min=1e-30))
        elif self.score == "taylor" and self.schedule.at(0.0) < 1:
            run(self.calibration_samples, self._check_and_gather)
        agree(buffer for mask in self.masks.values() for buffer in mask.buffers())
        self.is_calibrated = True

    @torch.no_grad()
    def step(self, progress: float) -> None:
        if self.frozen:
            return
        if self.score in CALIBRATED and not self.is_calibrated:
            raise RuntimeError(f"{self.score} scores need examples: call calibrate before the first step")
        density = self.schedule.at(progress)
        if density != self.density or self.schedule.masks_follow_scores:
            self._find_masks(density)
        if self.schedule.ends_by(progress):
            self._freeze()
        elif self.score == "l0":
            # By the progress, so that all processes and a resumed run draw alike; where the masks are, so that a GPU
            # is not waited for.
            device = next(iter(self.masks.values())).mask.device
            generator = torch.Generator(device).manual_seed(self.seed + round(progress * 2**40))
            for group in self.groups:
                group.draw(generator)

    def parameter_groups(self) -> list[dict[str, Any]]:
        scores = list(self._learned().values())
        groups = [{"params": scores, "lr": self.score_learning_rate, "weight_decay": 0.0}] if scores else []
        if self.structure == LAYERS:  # gates are 1, and masks alone close them
            gates = [module.parametrizations.weight.original for module in self.groups[0].modules.values()]
            groups.append({"params": gates, "lr": 0.0, "weight_decay": 0.0})
        return groups

    def check_gradients(self) -> None:
        if not all(bool(group.kept.all()) for group in self.groups):
            return  # what is all masked has no gradient, and may keep it from others
        for group in self.groups:
            if group.needs_gradient and not group.has_gradient:
                raise InputError(
                    f"the scores of {group.group.name} get no gradient: it is frozen, takes no part in the loss, or "
                    "weights beside it are all zero, and nothing can be learned about it; exclude it, or prune by "
                    "magnitude"
                )

    def observe(self) -> None:
        if self.score == "taylor" and not self.frozen:
            self._gather()

    def penalty(self) -> Tensor | float:
        learned = self._learned().values()
        if self.frozen or not self.score_penalty or not learned:
            return 0.0
        total = sum(scores.numel() for scores in learned)
        shift = IS_OPEN if self.score == "l0" else 0.0
        return self.score_penalty * sum((scores + shift).sigmoid().sum() / total for scores in learned)

    def metrics(self) -> dict[str, float]:
        """The share of weights kept; of several structures each under its own name."""
        kept = sum(int(group.kept.sum()) * group.group.size for group in self.groups)
        total = sum(group.group.count * group.group.size for group in self.groups)
        return {"density" if self.structure == "weights" else f"density_{self.structure}": kept / total}

    def state_dict(self) -> dict[str, Tensor]:
        density = torch.tensor(self.density, dtype=torch.float64)
        settings = torch.tensor(list(json.dumps(self.settings()).encode()), dtype=torch.uint8)
        return {"frozen": torch.tensor(self.frozen), "density": density, "settings": settings}

    def settings(self) -> dict[str, Any]:
        """What a resumed run has to have in common with the one before, in JSON's types."""
        return {
            "structure": self.structure,
            "score": self.score,
            "ranking": self.ranking,
            "schedule": str(self.schedule),
            "modules": list(self.masks),
            "pruned_layers": sorted(set(self.pruned_layers)),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if "settings" not in state:
            raise InputError(f"the checkpoint is of a run that did not prune {self.structure}")
        before = json.loads(bytes(state["settings"].tolist()))
        for name, now in self.settings().items():
            if before.get(name) != now:
                was = "are others" if isinstance(now, list) else f"is {before.get(name)} there and {now} here"
                raise InputError(
                    f"another pruning wrote the checkpoint, whose {name} {was}: resume with the same flags"
                )
        self.density = state["density"].item()
        self.is_calibrated = True  # of a run that has begun
        if state["frozen"]:
            self._freeze()

    def finish(self) -> None:
        modules = {name: module for group in self.groups for name, module in group.modules.items()}
        lost = [name for name, module in modules.items() if not is_parametrized(module, "weight")]
        if lost:
            raise RuntimeError(f"{len(lost)} of {len(modules)} modules have lost their masks, as {lost[0]}")
        for group in self.groups:
            group.check()
        sizes = {group.group.name: (int(group.kept.sum()), group.group.count) for group in self.groups}
        if self.ranking == "global":
            sizes = {"the model": (sum(kept for kept, _ in sizes.values()), sum(total for _, total in sizes.values()))}
        for name, (kept, total) in sizes.items():
            if kept != self._count(name, total):
                raise RuntimeError(
                    f"the run ended with {kept} of {total} {self.structure} kept in {name}, a density of "
                    f"{kept / total:.6f} instead of {self.schedule.density}"
                )

    def _find_masks(self, density: float) -> None:
        kept = self._select([group.ranking() for group in self.groups], density)
        for group, new in zip(self.groups, kept, strict=True):
            group.keep(new)
        self.density = density

    def _select(self, scores: list[Tensor], density: float) -> list[Tensor]:
        """Which units of each group are kept, by what they are ranked by."""
        if self.ranking == "global":
            return keep_highest_of_all(scores, round(density * sum(group.group.count for group in self.groups)))
        if self.ranking == "row":
            return [self._keep_in_rows(group, one, density) for group, one in zip(self.groups, scores, strict=True)]
        return keep_highest_of_each(scores, [round(density * group.group.count) for group in self.groups])

    @torch.no_grad()
    def _gather(self) -> None:
        for group in self.groups:
            group.observe()

    def _check_and_gather(self) -> None:
        self.check_gradients()
        self._gather()

    def _count(self, name: str, total: int) -> int:
        """How many units of a group, or of the model, are to be kept in the end."""
        if self.ranking != "row":
            return round(self.schedule.density * total)
        (width,) = {group.group.row_length for group in self.groups if group.group.name == name}
        return total // width * round(self.schedule.density * width)

    @staticmethod
    def _keep_in_rows(group: UnitMasks, scores: Tensor, density: float) -> Tensor:
        (layout,) = group.group.layouts.values()
        width = group.group.row_length
        kept = keep_highest_in_rows(scores.view(layout.view), round(density * width), 0 if layout.is_transposed else 1)
        return kept.flatten()

    def _freeze(self) -> None:
        self.frozen = True
        for mask in self.masks.values():
            if isinstance(mask, HardConcreteMask):
                mask.frozen = True

    def _find_groups(self, model: PreTrainedModel) -> list[UnitGroup]:
        if self.structure == LAYERS:
            group = gate_layers(model, self.pruned_layers)
            if self.pruned_layers:
                self.schedule = replace(self.schedule, density=1 - len(set(self.pruned_layers)) / group.count)
            return [group]
        found = find_prunable(model, self.patterns, self.excluded)
        free = {name: module for name, module in found.items() if not is_parametrized(module, "weight")}
        if not free:
            raise InputError(f"all {len(found)} modules carry masks already: nothing is left for {self.structure}")
        return find_groups(model, self.structure, free)

    def _learned(self) -> dict[str, nn.Parameter]:
        return {group.group.name: group.learned for group in self.groups if group.learned is not None}


def _keep_from_broadcasts(model: nn.Module) -> None:
    """Have DDP, once it wraps the model, leave the masks alone: every process finds the same ones.

    With each forward pass it sends all other buffers from the first process to the others.
    """
    masks = {name: module for name, module in model.named_modules() if isinstance(module, Mask)}
    buffers = [f"{name}.{key}" for name, mask in masks.items() for key, _ in mask.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
