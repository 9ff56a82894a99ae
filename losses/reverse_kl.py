"""Reverse Kullback-Leibler: the student is to put no weight where the teacher puts none."""

import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._logits import check_logits, checked_temperature, softened
from prunelle.losses._numerics import at_least_one


class ReverseKLLoss(nn.Module):
    r"""Kullback-Leibler divergence from the student's to the teacher's softened distribution.

    .. math:: \frac{T^2}{N} \sum_{n} \mathrm{KL}\left(
        \mathrm{softmax}(s_n / T) \,\|\, \mathrm{softmax}(t_n / T)\right)

    The expectation is over the student's own distribution: classes that the teacher thinks unlikely are
    forbidden, and a small student may settle for some of the likely ones.

    Args:
        temperature: T, above 0.

    Raises:
        ValueError: The temperature is not above 0, or the logits' shapes are not alike.

    Shapes:
        - student_logits, teacher_logits: (rows, classes). Select the rows to distil before.
        - num_items: scalar N, by default the number of rows. In training it is the number of rows in the whole
          accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 logits); 0 without rows.

    Reference:
        Gu et al., MiniLLM, arXiv:2306.08543, at the level of single tokens.

    Example:
        >>> loss = ReverseKLLoss(temperature=2.0)
        >>> loss(student_logits, teacher_logits).backward()
    """

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = checked_temperature(temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        check_logits(student_logits, teacher_logits)
        student, teacher = softened(student_logits, self.temperature), softened(teacher_logits, self.temperature)
        divergence = F.kl_div(teacher, student, reduction="sum", log_target=True)
        return divergence * self.temperature**2 / at_least_one(num_items, len(student_logits))
