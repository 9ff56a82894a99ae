"""Squared error of hidden states: the student's vectors are the teacher's."""

from torch import Tensor, nn

from prunelle.losses._hidden import comparable
from prunelle.losses._numerics import at_least_one


class HiddenMSELoss(nn.Module):
    r"""Mean squared error between student and teacher hidden states of size d, over attended tokens.

    .. math:: \frac{1}{N} \sum_{n} \frac{1}{d} \lVert W s_n - t_n \rVert^2

    Given the embeddings' output instead of a layer's it is TinyBERT's embedding loss.

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
        Jiao et al., TinyBERT, arXiv:1909.10351; Romero et al., FitNets, arXiv:1412.6550.

    Example:
        >>> loss = HiddenMSELoss(HiddenProjection(384, 768))
        >>> loss(student.hidden_states[2], teacher.hidden_states[4], attention_mask).backward()
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
        attended = attention_mask.to(student.dtype)
        errors = (student - teacher).square().mean(-1)
        return (errors * attended).sum() / at_least_one(num_items, attended.sum())
