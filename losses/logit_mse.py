"""Squared error of logits: the student learns what the teacher says before any softmax."""

import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._logits import check_logits
from prunelle.losses._numerics import at_least_float32, at_least_one


class LogitMSELoss(nn.Module):
    r"""Mean squared error between student and teacher logits, over C classes.

    .. math:: \frac{1}{N} \sum_{n} \frac{1}{C} \lVert s_n - t_n \rVert^2

    The mean over classes lets a weight mean the same for 2 classes and for a vocabulary; the references sum.

    Raises:
        ValueError: The logits' shapes are not alike.

    Shapes:
        - student_logits, teacher_logits: (rows, classes). Select the rows to distil before.
        - num_items: scalar N, by default the number of rows. In training it is the number of rows in the whole
          accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 logits); 0 without rows.

    Reference:
        Tang et al., Distilling Task-Specific Knowledge from BERT, arXiv:1903.12136; Kim et al., Comparing
        Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation, arXiv:2105.08919.

    Example:
        >>> LogitMSELoss()(student_logits, teacher_logits).backward()
    """

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        check_logits(student_logits, teacher_logits)
        total = F.mse_loss(at_least_float32(student_logits), at_least_float32(teacher_logits), reduction="sum")
        return total / max(student_logits.shape[-1], 1) / at_least_one(num_items, len(student_logits))
