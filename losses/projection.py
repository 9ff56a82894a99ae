"""A projection of the student's hidden states into the teacher's space, for the losses that compare the two."""

from typing import Literal

from torch import Tensor, nn


class HiddenProjection(nn.Linear):
    """A linear map without bias from the student's to the teacher's hidden size, learned beside the student.

    Its parameters belong to the loss that it is given to, not to the student.

    Args:
        student_size, teacher_size: the hidden sizes; they may be equal.
        initialization: `identity` starts as a student's states are, cut or filled up with zeros; `random` as
            any linear layer.

    Raises:
        ValueError: A size is below 1, or the initialization is neither.

    Shapes:
        - hidden: (…, student_size).
        - result: (…, teacher_size), in the projection's own dtype.

    Reference:
        Romero et al., FitNets, arXiv:1412.6550; Jiao et al., TinyBERT, arXiv:1909.10351.

    Example:
        >>> loss = HiddenMSELoss(HiddenProjection(384, 768))
        >>> optimizer.add_param_group({"params": loss.parameters()})
    """

    def __init__(
        self, student_size: int, teacher_size: int, initialization: Literal["identity", "random"] = "identity"
    ) -> None:
        if min(student_size, teacher_size) < 1:
            raise ValueError(f"hidden sizes must be at least 1, not {student_size} and {teacher_size}")
        if initialization not in ("identity", "random"):
            raise ValueError(f"initialization must be identity or random, not {initialization}")
        super().__init__(student_size, teacher_size, bias=False)
        if initialization == "identity":
            nn.init.eye_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype))
