"""Cosine of hidden states: the student's vectors point where the teacher's do."""

import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._hidden import comparable
from prunelle.losses._numerics import at_least_one


class HiddenCosineLoss(nn.Module):
    r"""One minus the cosine between student and teacher hidden states, over attended tokens.

    .. math:: \frac{1}{N} \sum_{n} \left(1 - \cos(W s_n, t_n)\right)

    Args:
        projection: W, such as `HiddenProjection`; by default none, for equal hidden sizes. It is trained with
            the student.

    Raises:
        ValueError: The hidden states' shapes are not alike, or the mask does not fit them.

    Shapes:
        - student_hidden, teacher_hidden: (batch, tokens, hidden); the student's hidden size may be another where
          it is projected.
        - attention_mask: (batch, tokens), 1 for attended tokens; padding takes no part.
        - num_items: scalar N, by default the number of attended tokens. In training it is their number in the
          whole accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 states); 0 where nothing is attended.

    Reference:
        Sanh et al., DistilBERT, arXiv:1910.01108, without a projection.

    Example:
        >>> loss = HiddenCosineLoss()
        >>> loss(student.hidden_states[-1], teacher.hidden_states[-1], attention_mask).backward()
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
        # A product with the mask instead of an index: no host synchronization on a GPU.
        cosine = F.cosine_similarity(student, teacher, dim=-1)
        attended = attention_mask.to(cosine.dtype)
        return ((1 - cosine) * attended).sum() / at_least_one(num_items, attended.sum())
