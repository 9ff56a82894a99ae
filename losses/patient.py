"""Patient distillation: the first token of each layer, where a classifier reads, points as the teacher's does."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._hidden import comparable
from prunelle.losses._numerics import at_least_one


class PatientLoss(nn.Module):
    r"""Squared distance between the normalized states of the first attended token, :math:`[CLS]` of a BERT.

    .. math:: \frac{1}{N} \sum_{n} \left\lVert \frac{W s_n}{\lVert W s_n \rVert}
        - \frac{t_n}{\lVert t_n \rVert} \right\rVert^2

    Args:
        projection: W, such as `HiddenProjection`; by default none, for equal hidden sizes. It is trained with
            the student.

    Raises:
        ValueError: The hidden states' shapes are not alike, or the mask does not fit them.

    Shapes:
        - student_hidden, teacher_hidden: (batch, tokens, hidden); the student's hidden size may be another where
          it is projected.
        - attention_mask: (batch, tokens), 1 for attended tokens.
        - num_items: scalar N, by default the number of examples with an attended token. In training it is their
          number in the whole accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 states); 0 where nothing is attended.

    Reference:
        Sun et al., Patient Knowledge Distillation for BERT, arXiv:1908.09355.

    Example:
        >>> loss = PatientLoss()
        >>> loss(student.hidden_states[1], teacher.hidden_states[2], attention_mask).backward()
    """

    def __init__(self, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.projection = projection

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        attention_mask: Tensor,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        student, teacher = comparable(student_hidden, teacher_hidden, attention_mask, self.projection)
        first = attention_mask.long().argmax(-1)
        rows = torch.arange(len(first), device=first.device)
        student, teacher = (F.normalize(states[rows, first], dim=-1) for states in (student, teacher))
        attended = attention_mask.bool().any(-1)
        distances = (student - teacher).square().sum(-1)
        return (distances * attended).sum() / at_least_one(num_items, attended.sum())
