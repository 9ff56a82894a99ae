"""Pruning while training: masks that follow the scores on a schedule, and stay once the density is reached."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel

from prunelle.compression.method import CompressionMethod
from prunelle.compression.pruning.masks import FixedMask, LearnedMask, Mask, first_scores
from prunelle.compression.pruning.schedule import CubicSchedule
from prunelle.compression.pruning.selection import keep_highest
from prunelle.compression.pruning.targets import find_prunable
from prunelle.errors import InputError

Score = Literal["magnitude", "movement", "soft_movement", "random"]


class Pruning(CompressionMethod):
    """Masks the weights of linear modules that have the lowest scores.

    Scores:

    - `magnitude`: |w|. Masked weights stay where they are, and can come back.
    - `movement`: learned by a straight-through gradient (arXiv:2005.07683); see `LearnedMask`.
    - `soft_movement`: the same, kept where the sigmoid of the score is above one threshold for the whole model, and a
      penalty on the sigmoids' mean. Published, the threshold stays and the penalty's weight is tuned until the
      density fits; here the threshold goes where the density is the one asked for.
    - `random`: drawn once, the baseline.

    Args:
        schedule: The target density and the way there.
        score: As above.
        ranking: Whether each `tensor` keeps the share of its own weights, or the `global` order decides how
            much of each is kept. By default `tensor`, for soft movement `global`.
        score_init: Where learned scores begin; see `first_scores`.
        score_learning_rate: Of learned scores, which know no weight decay.
        score_penalty: Weight of the mean sigmoid of learned scores in the loss. By default 1 for soft movement
            and 0 for movement.
        patterns, excluded: As `find_prunable` takes them.
        seed: Of random scores and of noise.

    Attributes:
        masks: By the qualified name of their weight, once attached.
        frozen: Whether the target has been reached; masks then stay as they are.
    """

    def __init__(
        self,
        schedule: CubicSchedule,
        score: Score = "movement",
        *,
        ranking: Literal["tensor", "global"] | None = None,
        score_init: Literal["magnitude", "zero", "noise"] = "magnitude",
        score_learning_rate: float = 1e-2,
        score_penalty: float | None = None,
        patterns: Sequence[str] = (),
        excluded: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.schedule, self.score, self.score_init = schedule, score, score_init
        self.ranking = ranking or ("global" if score == "soft_movement" else "tensor")
        self.score_learning_rate = score_learning_rate
        self.score_penalty = score_penalty if score_penalty is not None else float(score == "soft_movement")
        self.patterns, self.excluded, self.seed = patterns, excluded, seed
        self.modules: dict[str, Any] = {}
        self.masks: dict[str, Mask] = {}
        self.frozen = False

    def attach(self, model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.modules = find_prunable(model, self.patterns, self.excluded)
        for name, module in self.modules.items():
            mask = self._mask(module.get_parameter("weight"), generator)
            register_parametrization(module, "weight", mask)
            self.masks[f"{name}.weight"] = mask

    def start(self, steps: int) -> None:
        self.schedule.check(steps)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        if self.frozen:
            return
        density = self.schedule.at(progress)
        scores = [mask.score(weight) for mask, weight in zip(self.masks.values(), self._weights(), strict=True)]
        if self.ranking == "global":
            together = torch.cat([score.flatten() for score in scores])
            kept = keep_highest(together, round(density * together.numel())).split([s.numel() for s in scores])
        else:
            kept = tuple(keep_highest(score, round(density * score.numel())) for score in scores)
        for mask, new in zip(self.masks.values(), kept, strict=True):
            mask.mask.copy_(new.view_as(mask.mask))
        self.frozen = self.schedule.ends_by(progress)

    def parameter_groups(self) -> list[dict[str, Any]]:
        scores = [mask.scores for mask in self._learned().values()]
        return [{"params": scores, "lr": self.score_learning_rate, "weight_decay": 0.0}] if scores else []

    def check_gradients(self) -> None:
        for name, mask in self._learned().items():
            if mask.scores.grad is None or not mask.scores.grad.any():
                raise InputError(
                    f"the scores of {name} get no gradient: it takes no part in the loss, and nothing can be learned "
                    "about it; exclude it, or prune by magnitude"
                )

    def penalty(self) -> Tensor | float:
        learned = self._learned().values()
        if self.frozen or not self.score_penalty or not learned:
            return 0.0
        total = sum(mask.scores.numel() for mask in learned)
        return self.score_penalty * sum(mask.scores.sigmoid().sum() / total for mask in learned)

    def metrics(self) -> dict[str, float]:
        return {"density": self._kept() / self._total()}

    def state_dict(self) -> dict[str, Tensor]:
        return {"frozen": torch.tensor(self.frozen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.frozen = bool(state["frozen"])

    def finish(self) -> None:
        lost = [name for name, module in self.modules.items() if not hasattr(module, "parametrizations")]
        if lost:
            raise RuntimeError(f"{len(lost)} of {len(self.modules)} modules have lost their masks, as {lost[0]}")
        if self.ranking == "global":
            sizes = {"the model": (self._kept(), self._total())}
        else:
            sizes = {name: (int(mask.mask.count_nonzero()), mask.mask.numel()) for name, mask in self.masks.items()}
        for name, (kept, total) in sizes.items():
            if kept != round(self.schedule.density * total):
                raise RuntimeError(
                    f"the run ended with {kept} of {total} weights kept in {name}, a density of {kept / total:.6f} "
                    f"instead of {self.schedule.density}"
                )

    def _mask(self, weight: Tensor, generator: torch.Generator) -> Mask:
        if self.score == "magnitude":
            return Mask(weight)
        if self.score == "random":
            return FixedMask(weight, torch.rand(weight.shape, generator=generator).to(weight.device))
        return LearnedMask(weight, first_scores(weight, self.score_init, generator))

    def _weights(self) -> list[Tensor]:
        """The weights behind the masks, all of them."""
        return [module.parametrizations.weight.original for module in self.modules.values()]

    def _learned(self) -> dict[str, LearnedMask]:
        return {name: mask for name, mask in self.masks.items() if isinstance(mask, LearnedMask)}

    def _kept(self) -> int:
        return int(sum(mask.mask.count_nonzero() for mask in self.masks.values()))

    def _total(self) -> int:
        return sum(mask.mask.numel() for mask in self.masks.values())
