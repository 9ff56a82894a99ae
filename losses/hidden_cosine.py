"""Cosine of hidden states: the student's vectors point where the teacher's do."""

import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._numerics import at_least_float32, at_least_one


class HiddenCosineLoss(nn.Module):
    r"""One minus the cosine between student and teacher hidden states, over attended tokens.

    .. math:: \frac{1}{N} \sum_{n} \left(1 - \cos(s_n, t_n)\right)

    Raises:
        ValueError: The hidden states' shapes are not alike, or the mask does not fit them.

    Shapes:
        - student_hidden, teacher_hidden: (batch, tokens, hidden).
        - attention_mask: (batch, tokens), 1 for attended tokens; padding takes no part.
        - num_items: scalar N, by default the number of attended tokens. In training it is their number in the
          whole accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 states); 0 where nothing is attended.

    Reference:
        Sanh et al., DistilBERT, arXiv:1910.01108.
    """

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        attention_mask: Tensor,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        if student_hidden.shape != teacher_hidden.shape or attention_mask.shape != student_hidden.shape[:-1]:
            raise ValueError(
                f"student hidden states {tuple(student_hidden.shape)}, teacher hidden states "
                f"{tuple(teacher_hidden.shape)} and attention mask {tuple(attention_mask.shape)} must be "
                "(batch, tokens, hidden) twice and (batch, tokens)"
            )
        # A product with the mask instead of an index: no host synchronization on a GPU.
        cosine = F.cosine_similarity(at_least_float32(student_hidden), at_least_float32(teacher_hidden), dim=-1)
        attended = attention_mask.to(cosine.dtype)
        return ((1 - cosine) * attended).sum() / at_least_one(num_items, attended.sum())
