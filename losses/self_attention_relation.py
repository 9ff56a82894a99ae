"""Self-attention relations: what is alike for the teacher is alike for the student, whatever their sizes."""

import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._attention import (
    attended_pairs,
    check_vectors,
    checked_heads,
    masked_log_softmax,
    scaled_scores,
)
from prunelle.losses._numerics import at_least_one


class SelfAttentionRelationLoss(nn.Module):
    r"""Divergence of the student's from the teacher's relations between tokens, over H relation heads.

    .. math:: \frac{1}{N} \sum_{n} \frac{1}{H} \sum_{h} \mathrm{KL}\left(R^t_{hn} \,\|\, R^s_{hn}\right), \quad
        R_{hn} = \mathrm{softmax}_j\left(\frac{x_{hn} \cdot y_{hj}}{\sqrt{d}}\right)

    With values as x and as y these are MiniLM's value relations, with queries and keys its attention
    distributions. With queries, keys or values as both, and all heads' vectors split anew into H heads of size
    d, they are MiniLMv2's relations. Student and teacher need the same H, and not the same sizes.

    Args:
        heads: H, any number that divides both sizes.
        causal: whether a token is related only to itself and those before it.

    Raises:
        ValueError: heads is below 1 or does not divide the sizes, or the shapes do not fit.

    Shapes:
        - student_queries, student_keys: (batch, tokens, student's size): x and y, before they are split into
          heads; the same tensor twice for the relation of values with values.
        - teacher_queries, teacher_keys: (batch, tokens, teacher's size).
        - attention_mask: (batch, tokens), 1 for attended tokens; padding takes no part.
        - num_items: scalar N, by default the number of attended tokens. In training it is their number in the
          whole accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 inputs); 0 where nothing is attended.

    Reference:
        Wang et al., MiniLM, arXiv:2002.10957; Wang et al., MiniLMv2, arXiv:2012.15828.

    Example:
        >>> loss = SelfAttentionRelationLoss(heads=48)
        >>> loss(student_values, student_values, teacher_values, teacher_values, attention_mask).backward()
    """

    def __init__(self, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads = checked_heads(heads)
        self.causal = causal

    def forward(
        self,
        student_queries: Tensor,
        student_keys: Tensor,
        teacher_queries: Tensor,
        teacher_keys: Tensor,
        attention_mask: Tensor,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        check_vectors(student_queries, student_keys, attention_mask, self.heads)
        check_vectors(teacher_queries, teacher_keys, attention_mask, self.heads)
        pairs = attended_pairs(attention_mask, self.causal)
        student = masked_log_softmax(scaled_scores(student_queries, student_keys, self.heads), pairs)
        teacher = masked_log_softmax(scaled_scores(teacher_queries, teacher_keys, self.heads), pairs)
        divergences = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean(1)
        attended = attention_mask.to(divergences.dtype)
        return (divergences * attended).sum() / at_least_one(num_items, attended.sum())
