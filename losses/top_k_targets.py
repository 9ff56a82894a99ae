"""Top-k targets: the teacher's k likeliest classes, and one bucket for all the rest."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prunelle.losses._logits import checked_temperature
from prunelle.losses._numerics import at_least_float32, at_least_one


def top_k_distribution(teacher_logits: Tensor, k: int, temperature: float = 2.0) -> tuple[Tensor, Tensor]:
    """What `TopKTargetLoss` needs of the teacher: k + 1 numbers a row instead of a vocabulary.

    Args:
        teacher_logits: (rows, classes).
        k: how many classes are kept, at least 1 and fewer than there are.
        temperature: that of the loss.

    Returns:
        (rows, k + 1) log-probabilities of the k likeliest classes and, last, of all others together; (rows, k)
        the indices of the k.

    Raises:
        ValueError: k or the temperature means nothing, or the logits are not (rows, classes).
    """
    if teacher_logits.dim() != 2 or not 1 <= k < teacher_logits.shape[-1]:
        raise ValueError(
            f"teacher logits {tuple(teacher_logits.shape)} must be (rows, classes) with more than k = {k} classes, "
            "and k at least 1"
        )
    indices = teacher_logits.topk(k, dim=-1).indices
    return _Bucketed.apply(teacher_logits, indices, checked_temperature(temperature)), indices


class TopKTargetLoss(nn.Module):
    r"""Forward Kullback-Leibler divergence over the teacher's top k classes and one bucket for the tail.

    .. math:: \frac{T^2}{N} \sum_{n} \sum_{c \in \mathrm{top}_k(n) \cup \{\mathrm{tail}\}}
        p_n(c) \log \frac{p_n(c)}{q_n(c)}

    with p the teacher's and q the student's softened distribution, and the probability of the tail that of all
    other classes together. It is at most `SoftTargetLoss`, and falls short of it by what is said about the
    classes within the tail. Without the bucket the student would be free to put its weight there.

    Args:
        temperature: T, above 0.

    Raises:
        ValueError: The temperature is not above 0, or the shapes do not fit.

    Shapes:
        - student_logits: (rows, classes).
        - teacher_log_probabilities: (rows, k + 1), those of the k classes and then the tail's, at the temperature.
        - teacher_indices: (rows, k), the k classes; fewer than there are.
        - num_items: scalar N, by default the number of rows. In training it is the number of rows in the whole
          accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 logits); 0 without rows.

    Reference:
        The divergence is that of Hinton et al., arXiv:1503.02531, after merging the tail's classes.

    Example:
        >>> targets = top_k_distribution(teacher_logits, k=64, temperature=2.0)
        >>> TopKTargetLoss(temperature=2.0)(student_logits, *targets).backward()
    """

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = checked_temperature(temperature)

    def forward(
        self,
        student_logits: Tensor,
        teacher_log_probabilities: Tensor,
        teacher_indices: Tensor,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        rows, k = len(student_logits), teacher_indices.shape[-1]
        fits = teacher_indices.shape == (rows, k) and teacher_log_probabilities.shape == (rows, k + 1)
        if student_logits.dim() != 2 or not fits or k >= student_logits.shape[-1]:
            raise ValueError(
                f"student logits {tuple(student_logits.shape)}, teacher log-probabilities "
                f"{tuple(teacher_log_probabilities.shape)} and indices {tuple(teacher_indices.shape)} must be "
                "(rows, classes), (rows, k + 1) and (rows, k), with fewer than all classes in k"
            )
        student = _Bucketed.apply(student_logits, teacher_indices, self.temperature)
        teacher = teacher_log_probabilities.to(student.dtype)
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
        return divergence * self.temperature**2 / at_least_one(num_items, rows)


class _Bucketed(torch.autograd.Function):
    """(rows, k + 1) log-probabilities of the k classes and of all others together, at the temperature.

    With a backward pass of its own, because a step on cached answers costs little else beside the student's: it goes
    over the vocabulary once, and those of a softmax, a gather and a sum over the rest several times.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
        scaled = at_least_float32(logits) / temperature
        top = scaled.gather(-1, indices)
        # The tail is summed itself: one minus the top's sum would lose all digits of a small tail.
        tail = scaled.scatter_(-1, indices, -torch.inf)
        highest, place = tail.max(-1, keepdim=True)
        within = tail.softmax(-1)
        buckets = torch.cat([top, highest - within.gather(-1, place).log()], -1)
        result = buckets.log_softmax(-1)
        ctx.save_for_backward(within, indices, result)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        within, indices, result = ctx.saved_tensors
        slope = (slope - result.exp() * slope.sum(-1, keepdim=True)) / ctx.temperature
        every = (within * slope[:, -1:]).scatter_(-1, indices, slope[:, :-1])
        return every.to(ctx.dtype), None, None
