"""Metrics as local `evaluate` modules: `evaluate.load` would ask the hub for them."""

from typing import Any

import datasets
import evaluate
import numpy as np

FEATURES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, from 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=FEATURES)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroF1(evaluate.Metric):
    """Mean over classes of the harmonic mean of precision and recall, from 0 to 1.

    Over the classes that occur among predictions or references; a class that is never predicted rightly counts 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=FEATURES)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        classes = max(predicted.max(), true.max()) + 1
        hits = np.bincount(true[predicted == true], minlength=classes)
        seen = np.bincount(predicted, minlength=classes) + np.bincount(true, minlength=classes)
        return {"f1": float(np.mean(2 * hits[seen > 0] / seen[seen > 0]))}


def compute(metrics: list[type[evaluate.Metric]], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """All metrics of one set of predictions, by name.

    Args:
        metrics: Metric classes of this module.
        predictions: (examples,) predicted class indices.
        references: (examples,) true class indices.
    """
    results: dict[str, float] = {}
    for metric in metrics:
        results |= metric(keep_in_memory=True).compute(predictions=predictions, references=references)
    return results
