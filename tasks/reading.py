"""Predictions that are no classes of positions: read from all logits of the data at once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Predictions:
    """What a model predicts, one item an example.

    Attributes:
        values: (examples,) texts, or numbers.
        margins: (examples,) how sure each is, from 0 to 1.
        references: (examples,) what would have been right, to be shown.
        errors: (examples,) how wrong each is; 0 for what is right.
        metrics: the task's figures.
        tolerance: how far apart two numbers are before they count as different predictions.
    """

    values: NDArray[Any]
    margins: NDArray[np.float64]
    references: NDArray[Any]
    errors: NDArray[np.float64]
    metrics: dict[str, float]
    tolerance: float = 0.0


class ReadsLogits:
    """A task whose predictions are read from logits; see `tasks.Task` for the other verbs."""

    def choices(self, logits: NDArray[Any]) -> NDArray[Any]:
        """The logits of an exported model, one choice a label: of the labels' shape, and classes."""
        raise NotImplementedError

    def read(self, logits: NDArray[Any], rows: Any, split: str) -> Predictions:
        """What the logits of all of a split predict.

        Args:
            logits: as `choices` gives them, or as `trainers` keep them.
            rows: the split as `encode` gave it, in the same order.
            split: its name.
        """
        raise NotImplementedError
