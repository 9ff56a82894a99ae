"""Attention maps: the student's heads look where the teacher's do."""

from torch import Tensor, nn

from prunelle.losses._attention import attended_pairs, check_vectors, checked_heads, scaled_scores
from prunelle.losses._numerics import at_least_one


class AttentionMapLoss(nn.Module):
    r"""Mean squared error between student and teacher attention scores before the softmax, over H heads.

    .. math:: \frac{1}{N} \sum_{(i, j)} \frac{1}{H} \sum_{h}
        \left(\frac{q^s_{hi} \cdot k^s_{hj}}{\sqrt{d_s}} - \frac{q^t_{hi} \cdot k^t_{hj}}{\sqrt{d_t}}\right)^2

    over the pairs of attended tokens. Student and teacher have the same number of heads, of any size.

    Args:
        heads: H.
        causal: whether a token sees only itself and those before it.

    Raises:
        ValueError: heads is below 1 or does not divide the sizes, or the shapes do not fit.

    Shapes:
        - student_queries, student_keys: (batch, tokens, student's size), before they are split into heads.
        - teacher_queries, teacher_keys: (batch, tokens, teacher's size).
        - attention_mask: (batch, tokens), 1 for attended tokens; padding takes no part.
        - num_items: scalar N, by default the number of attended pairs. In training it is their number in the
          whole accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 inputs); 0 where nothing is attended.

    Reference:
        Jiao et al., TinyBERT, arXiv:1909.10351.

    Example:
        >>> loss = AttentionMapLoss(heads=12)
        >>> loss(student_queries, student_keys, teacher_queries, teacher_keys, attention_mask).backward()
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
        student = scaled_scores(student_queries, student_keys, self.heads)
        teacher = scaled_scores(teacher_queries, teacher_keys, self.heads)
        pairs = attended_pairs(attention_mask, self.causal)
        total = ((student - teacher).square() * pairs).sum() / self.heads
        return total / at_least_one(num_items, pairs.sum())
