"""Hard labels: the cross-entropy that the task would be trained with alone."""

import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._numerics import at_least_float32, at_least_one


class HardLabelLoss(nn.Module):
    r"""Cross-entropy with the true classes; with masked tokens as labels it is the masked-LM loss.

    .. math:: -\frac{1}{N} \sum_{n} \log \mathrm{softmax}(s_n)_{y_n}

    Smoothed, the true class has :math:`1 - \epsilon` and all C classes, it among them, :math:`\epsilon / C` more.

    Args:
        label_smoothing: :math:`\epsilon`, from 0 to 1.

    Raises:
        ValueError: The logits are not (rows, classes) with one label a row.

    Shapes:
        - student_logits: (rows, classes).
        - labels: (rows,), class indices; -100 leaves a row out.
        - num_items: scalar N, by default the number of rows that are not left out. In training it is their
          number in the whole accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 logits); 0 where every row is left out.

    Reference:
        The masked-LM case: Devlin et al., BERT, arXiv:1810.04805. Smoothing: Szegedy et al., arXiv:1512.00567.

    Example:
        >>> HardLabelLoss()(student_logits, labels).backward()
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, student_logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        if student_logits.dim() != 2 or labels.shape != student_logits.shape[:1]:
            raise ValueError(
                f"logits {tuple(student_logits.shape)} must be (rows, classes) and labels "
                f"{tuple(labels.shape)} one class a row"
            )
        logits, smoothing = at_least_float32(student_logits), self.label_smoothing
        total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100, label_smoothing=smoothing)
        return total / at_least_one(num_items, labels.ne(-100).sum())
