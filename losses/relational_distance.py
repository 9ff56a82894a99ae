"""Relational distillation, distances: examples are as far apart for the student as for the teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._numerics import at_least_float32, at_least_one


class RelationalDistanceLoss(nn.Module):
    r"""Huber loss between the distances of all pairs of rows, each in units of the mean distance.

    .. math:: \frac{1}{N} \sum_{i < j} \ell_1\left(\frac{\lVert s_i - s_j \rVert}{\mu_s},
        \frac{\lVert t_i - t_j \rVert}{\mu_t}\right), \quad
        \ell_1(a, b) = \begin{cases} (a - b)^2 / 2 & |a - b| \le 1 \\ |a - b| - 1/2 & \text{else} \end{cases}

    The mean distances :math:`\mu` make it independent of either model's scale, and sizes may differ. Pairs are
    those of one call: rows of batches that are accumulated do not meet.

    Raises:
        ValueError: The inputs are not one teacher row a student row.

    Shapes:
        - student, teacher: (rows, size), such as one vector a sentence; sizes may differ.
        - num_items: scalar N, by default the number of pairs. In training it is their number in the whole
          accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 inputs); 0 for fewer than 2 rows.

    Reference:
        Park et al., Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> RelationalDistanceLoss()(student_sentences, teacher_sentences).backward()
    """

    def forward(self, student: Tensor, teacher: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be (rows, size) with "
                "as many rows"
            )
        distances = _relative_distances(at_least_float32(student))
        total = F.smooth_l1_loss(distances, _relative_distances(at_least_float32(teacher)), reduction="sum")
        return total / at_least_one(num_items, len(distances))


def _relative_distances(rows: Tensor) -> Tensor:
    one, other = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
    distances = torch.linalg.vector_norm(rows[one] - rows[other], dim=-1)
    mean = distances.sum() / max(len(distances), 1)
    # Rows that are all alike have no distances to speak of, and must not divide by 0.
    return distances / mean.clamp(min=torch.finfo(rows.dtype).eps)
