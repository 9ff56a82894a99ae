"""Decoupled distillation: how sure the teacher is, and what it thinks of the other classes, weighed apart."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._logits import check_logits, checked_temperature, softened
from prunelle.losses._numerics import at_least_one


class DecoupledLoss(nn.Module):
    r"""The divergence from the teacher's distribution, split at the labelled class.

    .. math:: \frac{T^2}{N} \sum_{n} \alpha \, \mathrm{KL}(b^t_n \,\|\, b^s_n)
        + \beta \, \mathrm{KL}(\hat p^t_n \,\|\, \hat p^s_n)

    where :math:`b` holds the probabilities of the labelled class and of all others together, and
    :math:`\hat p` is the distribution over the others alone. With :math:`\alpha = 1` and :math:`\beta` the
    teacher's probability of the other classes, the sum is `SoftTargetLoss`, in which a sure teacher says little
    about the others. With 2 classes there is one other class and the second part is 0.

    Args:
        target_weight: alpha.
        non_target_weight: beta.
        temperature: T, above 0.

    Raises:
        ValueError: A weight is negative or both are 0, the temperature is not above 0, the logits' shapes are
            not alike, there are fewer than 2 classes, or not one label a row.

    Shapes:
        - student_logits, teacher_logits: (rows, classes).
        - labels: (rows,), class indices; -100 leaves a row out.
        - num_items: scalar N, by default the number of rows that are not left out. In training it is their
          number in the whole accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 logits); 0 where every row is left out.

    Reference:
        Zhao et al., Decoupled Knowledge Distillation, arXiv:2203.08679.

    Example:
        >>> loss = DecoupledLoss(target_weight=1.0, non_target_weight=8.0, temperature=4.0)
        >>> loss(student_logits, teacher_logits, labels).backward()
    """

    def __init__(self, target_weight: float = 1.0, non_target_weight: float = 8.0, temperature: float = 2.0) -> None:
        super().__init__()
        weights = (target_weight, non_target_weight)
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise ValueError(f"target_weight and non_target_weight must be at least 0 and one above, not {weights}")
        self.target_weight, self.non_target_weight = weights
        self.temperature = checked_temperature(temperature)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        check_logits(student_logits, teacher_logits)
        if labels.shape != student_logits.shape[:1] or student_logits.shape[-1] < 2:
            raise ValueError(
                f"logits {tuple(student_logits.shape)} must be (rows, classes) of at least 2 classes and labels "
                f"{tuple(labels.shape)} one class a row"
            )
        kept = labels.ne(-100)
        is_target = F.one_hot(labels.where(kept, 0), student_logits.shape[-1]).bool()
        student_binary, student_others = self._split(student_logits, is_target)
        teacher_binary, teacher_others = self._split(teacher_logits, is_target)
        rows = self.target_weight * F.kl_div(student_binary, teacher_binary, reduction="none", log_target=True).sum(-1)
        rows = rows + self.non_target_weight * F.kl_div(
            student_others, teacher_others, reduction="none", log_target=True
        ).sum(-1)
        return (rows * kept).sum() * self.temperature**2 / at_least_one(num_items, kept.sum())

    def _split(self, logits: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, 2) log-probabilities of the target and of all others; (rows, classes) of each among the others."""
        log_probabilities = softened(logits, self.temperature)
        others = log_probabilities.masked_fill(is_target, -torch.inf)
        all_others = others.logsumexp(-1, keepdim=True)
        target = log_probabilities.masked_fill(~is_target, 0).sum(-1, keepdim=True)
        # The target is no class of the others: alike in student and teacher, it adds nothing to their divergence.
        return torch.cat([target, all_others], -1), (others - all_others).masked_fill(is_target, 0)
