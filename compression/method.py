"""What every way of compressing a model has in common, whatever trains it."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

RunOnExamples = Callable[[int, Callable[[], None] | None], None]  # see `CompressionMethod.calibrate`


class CompressionMethod:
    """Changes what a model's weights are while it is trained, by `torch.nn.utils.parametrize` and nothing else.

    Several stack on one weight, in the order in which they are attached, and `bake` ends them all. In a
    hand-written loop:

        method.attach(model)
        optimizer = AdamW([{"params": weights}, *method.parameter_groups()])
        method.start(steps)
        method.calibrate(model, run)
        method.step(0.0)
        for number, batch in enumerate(batches):
            (loss(model, batch) + method.penalty()).backward()
            method.observe()
            optimizer.step()
            method.step((number + 1) / steps)
        method.finish()
        bake(model)

    Every verb but `attach` does nothing unless a method needs it.
    """

    def attach(self, model: PreTrainedModel) -> None:
        """Parametrize the model's weights, in place, on its device. Before a checkpoint of the run is loaded.

        Raises:
            InputError: The model has not what is asked for.
        """
        raise NotImplementedError

    def start(self, steps: int) -> None:
        """Learn how many optimizer steps the whole run has.

        Raises:
            InputError: They do not suffice.
        """

    def calibrate(self, model: PreTrainedModel, run: RunOnExamples) -> None:
        """Look at examples before the first step of a run that is not resumed.

        Args:
            model: What the method is attached to.
            run: Takes a number of examples, the same at every call and on all processes, and computes the loss's
                gradients on them batch by batch, calling its second argument after each; if that is None, the loss
                alone. No weight changes.
        """

    def step(self, progress: float) -> None:
        """Bring what depends on the weights, or on the schedule, up to date: before the first optimizer step and
        after every one.

        Args:
            progress: The share of the run's optimizer steps that is done, from 0 to 1.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is to train otherwise than the model's weights: groups as PyTorch's optimizers take."""
        return []

    def learning_rate_steps(self, steps: int) -> list[int] | None:
        """For each optimizer step of the run, that of a shorter run whose learning rate it takes; None to leave it.

        Raises:
            InputError: The steps do not suffice.
        """
        return None

    def check_gradients(self) -> None:
        """See, between the first backward pass and the step after it, that what is to be learned can be.

        Raises:
            InputError: Something attached takes no part in the loss.
        """

    def observe(self) -> None:
        """Take note of the weights' gradients, between the last backward pass and the step after it, every time."""

    def penalty(self) -> Tensor | float:
        """What is added to the loss, once an optimizer step."""
        return 0.0

    def metrics(self) -> dict[str, float]:
        """What is worth logging, by name."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beyond the model's own state dict, which holds the parametrizations."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave, before the model's own is loaded.

        Raises:
            InputError: It is not of this method with these settings.
        """

    def finish(self) -> None:
        """See that the run has come to where it was to end.

        Raises:
            RuntimeError: It has not.
        """
