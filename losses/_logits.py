"""What the losses on logits have in common."""

import torch.nn.functional as F
from torch import Tensor

from prunelle.losses._numerics import at_least_float32


def checked_temperature(temperature: float) -> float:
    """The temperature, if it means something.

    Raises:
        ValueError: It is not above 0 and finite.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, not {temperature}")
    return temperature


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """See that there is one teacher row a student row, over the same classes.

    Raises:
        ValueError: The shapes are not alike, or not (rows, classes).
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} "
            "must both be (rows, classes); broadcast, they would compare classes that do not belong together"
        )


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the classes, the logits divided by the temperature."""
    return F.log_softmax(at_least_float32(logits) / temperature, dim=-1)
