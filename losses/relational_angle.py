"""Relational distillation, angles: three examples span the same angle for the student as for the teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelle.losses._numerics import at_least_float32, at_least_one, full_precision


class RelationalAngleLoss(nn.Module):
    r"""Huber loss between the cosines of the angles that all triplets of different rows span.

    .. math:: \frac{1}{N} \sum_{i, j, k} \ell_1\left(\cos \angle s_i s_j s_k, \cos \angle t_i t_j t_k\right), \quad
        \ell_1(a, b) = \begin{cases} (a - b)^2 / 2 & |a - b| \le 1 \\ |a - b| - 1/2 & \text{else} \end{cases}

    with j at the corner. Sizes may differ. Triplets are those of one call: rows of batches that are accumulated
    do not meet. Memory grows with the cube of the rows: 64 rows of float32 take 1 MiB, 512 take 512 MiB.

    Raises:
        ValueError: The inputs are not one teacher row a student row.

    Shapes:
        - student, teacher: (rows, size), such as one vector a sentence; sizes may differ.
        - num_items: scalar N, by default the number of ordered triplets, rows (rows - 1) (rows - 2). In
          training it is their number in the whole accumulated batch over all processes.
        - result: scalar, float32 (float64 for float64 inputs); 0 for fewer than 3 rows.

    Reference:
        Park et al., Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> RelationalAngleLoss()(student_sentences, teacher_sentences).backward()
    """

    def forward(self, student: Tensor, teacher: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be (rows, size) with "
                "as many rows"
            )
        rows = len(student)
        cosines = _cosines(at_least_float32(student))
        total = F.smooth_l1_loss(cosines, _cosines(at_least_float32(teacher)), reduction="sum")
        return total / at_least_one(num_items, rows * (rows - 1) * (rows - 2))


def _cosines(rows: Tensor) -> Tensor:
    """(corner, one, other) cosines; where two of the three are the same row, 0 or 1 whatever the rows are."""
    sides = rows.unsqueeze(0) - rows.unsqueeze(1)
    lengths = torch.linalg.vector_norm(sides, dim=-1, keepdim=True)
    # Rows that are alike have no direction: a side of length 0 stays 0, and its gradient finite.
    sides = sides / lengths.where(lengths > 0, 1)
    with full_precision(sides):
        return sides @ sides.transpose(-1, -2)
