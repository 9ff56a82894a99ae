"""Text classification with any number of labels a text."""

from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from prunelle.errors import InputError
from prunelle.tasks import metrics
from prunelle.tasks.choices import MULTI_LABEL
from prunelle.tasks.classes import Classification, check_known, class_values
from prunelle.tasks.metrics import UNLABELED
from prunelle.tasks.reading import Predictions, ReadsLogits
from prunelle.tasks.text_classification import TextTask


class MultiLabelClassification(ReadsLogits, TextTask, Classification):
    """Each label is a choice of its own, yes or no: the sigmoid of its logit is its probability.

    The column holds a list of labels a text, of names or numbers, which may be empty.
    """

    problem_type = MULTI_LABEL

    def is_labelled(self, rows: datasets.Dataset, split: str, column: str, place: str) -> bool:
        """Raises InputError: no lists, fewer than two labels, or one that training never saw."""
        if not isinstance(rows.features["label"], datasets.List):
            raise InputError(
                f"{place}: column {column!r} holds no lists, such as JSON lines and Parquet can hold; leave out "
                "--problem_type multi_label_classification for one label a text"
            )
        kind, labels = rows.features["label"].feature, rows["label"][:]
        for number, values in enumerate(labels, start=1):
            if values is None or None in values:
                raise InputError(f"{place}, example {number}: column {column!r} holds no labels but {values!r}")
            if len(set(values)) < len(values):
                raise InputError(
                    f"{place}, example {number}: column {column!r} names a label twice, {values!r}; it wants the "
                    "labels that a text has, not zeros and ones for all"
                )
        if split == "train":
            names = kind.names if isinstance(kind, datasets.ClassLabel) else None
            found = {value for values in labels for value in values}
            self.learn_classes(class_values(found, column, place) if names is None else list(range(len(names))), names)
        else:
            check_known(labels, list(self.class_index), place)
        return True

    def target(self, label: list[Any]) -> list[int]:
        chosen = {self.class_index[value] for value in label}
        return [int(number in chosen) for number in range(len(self.class_names))]

    def no_target(self) -> list[int]:
        return [UNLABELED] * len(self.class_names)

    def choices(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Of (examples, labels): (examples, labels, 2), the logits of no and of yes."""
        return np.stack([np.zeros_like(logits), logits], axis=-1)

    def read(self, logits: NDArray[Any], rows: Any, split: str) -> Predictions:
        """The labels that are likelier than not. A prediction is as sure as the least sure of its labels."""
        scores = (logits if logits.ndim == 2 else logits[..., 1] - logits[..., 0]).astype(np.float64)
        references = np.array(rows["labels"][:])
        return Predictions(
            values=self._named(scores > 0),
            margins=np.tanh(np.abs(scores) / 2).min(axis=1),  # |2 sigmoid - 1|
            references=self._named(references == 1),
            errors=((scores > 0) != (references == 1)).mean(axis=1),
            metrics=self.compute_metrics(scores, references),
        )

    @staticmethod
    def compute_metrics(predictions: Any, references: Any) -> dict[str, float]:
        return metrics.compute([metrics.MultiLabelF1, metrics.AveragePrecision], predictions, references)

    def _named(self, chosen: NDArray[np.bool_]) -> NDArray[Any]:
        names = np.array(self.class_names, dtype=object)
        return np.array([", ".join(names[row]) or "(none)" for row in chosen], dtype=object)
