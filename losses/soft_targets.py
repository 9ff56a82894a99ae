"""Soft targets: the student learns the teacher's distribution over classes."""

import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._numerics import at_least_float32, at_least_one


class SoftTargetLoss(nn.Module):
    r"""Forward Kullback-Leibler divergence from the teacher's to the student's softened distribution.

    .. math:: \frac{T^2}{N} \sum_{n} \mathrm{KL}\left(
        \mathrm{softmax}(t_n / T) \,\|\, \mathrm{softmax}(s_n / T)\right)

    The factor :math:`T^2` keeps the gradient's size the same when the temperature changes. The teacher's
    entropy is part of the divergence, so identical logits give 0.

    Args:
        temperature: T, above 0.

    Raises:
        ValueError: The temperature is not above 0, or the logits' shapes are not alike.

    Shapes:
        - student_logits, teacher_logits: (rows, classes). Select the rows to distil before.
        - num_items: scalar N, by default the number of rows. In training it is the number of rows in the whole
          accumulated batch over all processes, so that accumulation does not change the gradient.
        - result: scalar, float32 (float64 for float64 logits); 0 without rows.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531.

    Example:
        >>> loss = SoftTargetLoss(temperature=2.0)
        >>> loss(student_logits, teacher_logits).backward()
    """

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite, not {temperature}")
        self.temperature = temperature

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
            raise ValueError(
                f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} "
                "must both be (rows, classes); broadcast, they would compare classes that do not belong together"
            )
        student = F.log_softmax(at_least_float32(student_logits) / self.temperature, dim=-1)
        teacher = F.log_softmax(at_least_float32(teacher_logits) / self.temperature, dim=-1)
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
        return divergence * self.temperature**2 / at_least_one(num_items, len(student_logits))
