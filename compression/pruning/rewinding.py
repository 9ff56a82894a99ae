"""Training goes back between rounds of pruning: the learning rate, and the weights if asked for."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelle.compression.method import CompressionMethod
from prunelle.compression.pruning.masks import LearnedMask
from prunelle.compression.pruning.schedule import IterativeSchedule


class Rewinding(CompressionMethod):
    """After each round of iterative pruning the learning rate is again what it was earlier (arXiv:2003.02389).

    The optimizer's moments go on as they are, and so do masks and learned scores.

    Args:
        schedule: That of the pruning, which stands before this in the list of methods.
        weights: Whether the model's weights, too, become again what they were then. Masks are found first.
    """

    def __init__(self, schedule: IterativeSchedule, weights: bool) -> None:
        self.schedule, self.weights = schedule, weights
        self.parameters: dict[str, Tensor] = {}
        self.saved: dict[str, Tensor] = {}
        self.rounds, self.steps = 0, 0

    def attach(self, model: PreTrainedModel) -> None:
        masks = [module for module in model.modules() if isinstance(module, LearnedMask)]
        scores = {id(parameter) for mask in masks for parameter in mask.parameters()}
        self.parameters = {name: tensor for name, tensor in model.named_parameters() if id(tensor) not in scores}

    def start(self, steps: int) -> None:
        self.schedule.check(steps)
        self.steps = steps

    def learning_rate_steps(self, steps: int) -> list[int]:
        self.schedule.check(steps)
        first, *others = self.schedule.starts(steps)
        back = self.schedule.rewound_step(steps)
        places = list(range(first))
        for begin, end in zip([first, *others], [*others, steps], strict=True):
            places += [min(back + step, first - 1) for step in range(end - begin)]
        return places

    @torch.no_grad()
    def step(self, progress: float) -> None:
        if not self.weights:
            return
        if not self.saved and round(progress * self.steps) >= self.schedule.rewound_step(self.steps):
            self.saved = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        rounds = self.schedule.rounds_by(progress)
        if rounds > self.rounds:
            for name, tensor in self.parameters.items():
                tensor.copy_(self.saved[name])
        self.rounds = rounds

    def state_dict(self) -> dict[str, Tensor]:
        return {"rounds": torch.tensor(self.rounds)} | {f"weights.{name}": value for name, value in self.saved.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rounds = int(state["rounds"])
        device = next(iter(self.parameters.values())).device
        saved = {name.removeprefix("weights."): value for name, value in state.items() if name != "rounds"}
        self.saved = {name: value.to(device) for name, value in saved.items()}
