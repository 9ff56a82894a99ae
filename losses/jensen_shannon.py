"""Generalized Jensen-Shannon: between the forward and the reverse divergence, and bounded."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._logits import check_logits, checked_temperature, softened
from prunelle.losses._numerics import at_least_one


class JensenShannonLoss(nn.Module):
    r"""Generalized Jensen-Shannon divergence of the student's and the teacher's softened distributions.

    .. math:: \frac{T^2}{N} \sum_{n} \beta \, \mathrm{KL}(p_n \,\|\, m_n) + (1 - \beta) \, \mathrm{KL}(q_n \,\|\, m_n),
        \quad m_n = \beta p_n + (1 - \beta) q_n

    with p the teacher's and q the student's distribution. Near 0 it becomes :math:`\beta` times the forward
    divergence, near 1 :math:`1 - \beta` times the reverse one; at either end it is 0 whatever the student does.

    Args:
        beta: the teacher's share of the mixture, between 0 and 1 and neither.
        temperature: T, above 0.

    Raises:
        ValueError: beta is not between 0 and 1, the temperature is not above 0, or the logits' shapes are not alike.

    Shapes:
        - student_logits, teacher_logits: (rows, classes). Select the rows to distil before.
        - num_items: scalar N, by default the number of rows. In training it is the number of rows in the whole
          accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 logits); 0 without rows.

    Reference:
        Agarwal et al., On-Policy Distillation of Language Models (GKD), arXiv:2306.13649.

    Example:
        >>> loss = JensenShannonLoss(beta=0.5, temperature=2.0)
        >>> loss(student_logits, teacher_logits).backward()
    """

    def __init__(self, beta: float = 0.5, temperature: float = 2.0) -> None:
        super().__init__()
        if not 0 < beta < 1:
            raise ValueError(f"beta must be between 0 and 1 and neither, not {beta}: nothing would be learned")
        self.beta = beta
        self.temperature = checked_temperature(temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        check_logits(student_logits, teacher_logits)
        student, teacher = softened(student_logits, self.temperature), softened(teacher_logits, self.temperature)
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        divergence = self.beta * F.kl_div(mixture, teacher, reduction="sum", log_target=True)
        divergence = divergence + (1 - self.beta) * F.kl_div(mixture, student, reduction="sum", log_target=True)
        return divergence * self.temperature**2 / at_least_one(num_items, len(student_logits))
