"""A number a text, such as a rating, or a number a pair of texts, such as how alike they are."""

import math
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from prunelle.errors import InputError
from prunelle.tasks import metrics
from prunelle.tasks.choices import REGRESSION
from prunelle.tasks.classes import check_problem
from prunelle.tasks.loading import where
from prunelle.tasks.metrics import IGNORED, UNLABELED
from prunelle.tasks.reading import Predictions, ReadsLogits
from prunelle.tasks.text_classification import TextTask

SAME = 0.1  # of the labels' standard deviation: numbers that lie no further apart are the same prediction


class TextRegression(ReadsLogits, TextTask):
    """The model's one logit is the number."""

    def is_labelled(self, rows: datasets.Dataset, split: str, column: str, place: str) -> bool:
        """Raises InputError: a label that is no number, or labels that are all the same."""
        labels = rows["label"][:]
        for number, value in enumerate(labels, start=1):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{place}, example {number}: column {column!r} holds no number but {value!r}")
            if value in (IGNORED, UNLABELED):
                raise InputError(f"{place}, example {number}: {value:g} stands for no label: shift or scale the labels")
        if split == "train" and len(set(labels)) < 2:
            raise InputError(f"{place}: column {column!r} holds one number only, {labels[0]!r}: nothing to predict")
        return True

    def target(self, label: float) -> float:
        return float(label)

    def no_target(self) -> float:
        return float(UNLABELED)

    def configure(self, config: PreTrainedConfig) -> None:
        """Give a model whose head is still to be trained one output."""
        config.id2label, config.label2id, config.problem_type = {0: "LABEL_0"}, {"LABEL_0": 0}, REGRESSION

    def adopt(self, config: PreTrainedConfig, model_name: str) -> None:
        """See that a head that is trained already predicts a number.

        Raises:
            InputError: It predicts classes.
        """
        check_problem(config, REGRESSION, model_name)
        if config.num_labels != 1:
            raise InputError(
                f"{model_name} predicts {config.num_labels} classes, but {where(self.arguments, 'train')} is labelled "
                "with numbers (--problem_type regression)"
            )

    def choices(self, logits: NDArray[Any]) -> NDArray[Any]:
        return logits

    def read(self, logits: NDArray[Any], rows: Any, split: str) -> Predictions:
        """The numbers. The model says nothing about how sure they are."""
        values, references = logits[:, 0].astype(np.float64), np.array(rows["labels"][:], dtype=np.float64)
        return Predictions(
            values=values,
            margins=np.zeros(len(values)),
            references=references,
            errors=np.abs(values - references),
            metrics=self.compute_metrics(values, references),
            tolerance=SAME * float(references.std()),
        )

    @staticmethod
    def compute_metrics(predictions: Any, references: Any) -> dict[str, float]:
        return metrics.compute([metrics.Correlation, metrics.MeanSquaredError], predictions, references)
