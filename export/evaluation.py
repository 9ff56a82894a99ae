"""Several models over the same data, and where their predictions part."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from prunelle.errors import InputError
from prunelle.export.runner import Batch, Logits, Runner
from prunelle.tasks import Predictions

LOWER_IS_BETTER = ("loss", "mse")
IGNORED = -100  # the label of a position that is not scored, as everywhere in the field

ComputeMetrics = Callable[[Any, Any], Mapping[str, float]]


@dataclass(frozen=True)
class Reader:
    """How predictions that are no classes are read, as `prunelle.tasks.ReadsLogits` does.

    Attributes:
        choices: a batch's logits as one choice a label: (…, classes) for labels of shape (…).
        read: what the logits of all batches, so shaped, predict.
    """

    choices: Callable[[Logits], Logits]
    read: Callable[[Logits], Predictions]


@dataclass
class Evaluation:
    """What one model did with the data.

    Attributes:
        metrics: what `compute_metrics` gave, and `loss`, the mean cross-entropy in nats, or squared error of numbers.
        flips: how many predictions differ from the reference model's.
        total: how many predictions there were.
        max_abs_logit_difference: the largest difference of a logit from the reference model's.
        predictions: (total,) the predicted classes, texts or numbers.
        margins: (total,) how sure each prediction was, from 0 to 1: its probability less the next one's.
        references: (total,) the true classes, or what else would have been right.
        errors: (total,) how wrong each prediction is, 0 for what is right.
        tolerance: how far apart two numbers are before they are different predictions.
    """

    metrics: dict[str, float]
    flips: int
    total: int
    max_abs_logit_difference: float
    predictions: NDArray[Any]
    margins: NDArray[np.float64]
    references: NDArray[Any]
    errors: NDArray[np.float64]
    tolerance: float = 0.0

    def differs(self, other: "Evaluation") -> NDArray[np.bool_]:
        """(total,) which predictions are not the other's."""
        if self.tolerance:
            return ~(np.abs(self.predictions - other.predictions) <= self.tolerance)  # so written that NaN differs
        return self.predictions != other.predictions


def evaluate(
    runners: Sequence[Runner],
    batches: Iterable[Batch],
    compute_metrics: ComputeMetrics,
    *,
    reference: Runner,
    reader: Reader | None = None,
) -> list[Evaluation]:
    """Runs all models batch by batch over the same data, once, and keeps predictions, not logits.

    Args:
        runners: the models, `reference` among them.
        batches: mappings of tensors with the models' inputs and `labels`, class numbers of shape (batch,)
            or (batch, length). Positions labelled -100 are left out. Position i of the labels is scored
            against position i of the logits: a causal model's labels must be shifted beforehand.
        compute_metrics: predictions and references to named figures, both of the labels' shape over all batches:
            (examples,), or (examples, length) with -100 where nothing is scored. Not asked where there is a reader.
        reference: the model that flips and logit differences are counted against.
        reader: reads predictions that are no classes. All logits are kept for it, and labels may be numbers.

    Raises:
        InputError: no labels, labels that are not class numbers of the models, or logits of other shapes.
    """
    tallies = [_Tally() for _ in runners]
    ordered = sorted(zip(runners, tallies, strict=True), key=lambda pair: pair[0] is not reference)
    references: list[NDArray[np.int64]] = []
    for batch in batches:
        labels = _labels(batch, reader)
        scored = labels != IGNORED
        kept_labels = labels[scored]
        references.append(labels)
        reference_logits: Logits | None = None
        for runner, tally in ordered:
            logits = runner(batch)
            if reader is not None:
                logits = reader.choices(logits)
            if logits.shape[:-1] != labels.shape:
                raise InputError(
                    f"{runner.name} gives logits of shape {logits.shape} for labels of shape {labels.shape}"
                )
            are_classes = np.issubdtype(labels.dtype, np.integer)
            if are_classes and kept_labels.size and not 0 <= kept_labels.min() <= kept_labels.max() < logits.shape[-1]:
                raise InputError(f"a label is not among the {logits.shape[-1]} classes of {runner.name}")
            if reader is not None:
                tally.logits.append(logits)
            kept_logits = logits[scored]
            del logits  # (batch, length, vocabulary) can take a quarter of a gigabyte
            if reference_logits is None:
                reference_logits = kept_logits
            elif reference_logits.shape != kept_logits.shape:
                raise InputError(
                    f"{runner.name} has {kept_logits.shape[-1]} classes, {reference.name} has "
                    f"{reference_logits.shape[-1]}"
                )
            tally.add(kept_logits, reference_logits, kept_labels)
    every = _stacked(references)
    if not (every != IGNORED).any():
        raise InputError("the evaluation data holds no labelled example")
    results = [tally.close(every, compute_metrics, reader) for tally in tallies]
    (original,) = (result for result, runner in zip(results, runners, strict=True) if runner is reference)
    for result in results:
        result.flips = int(result.differs(original).sum())
    return results


@dataclass
class _Tally:
    """One model's running sums."""

    predictions: list[NDArray[np.int64]] = field(default_factory=list)
    margins: list[NDArray[np.float64]] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)
    loss: float = 0.0
    difference: float = 0.0

    def add(self, logits: Logits, reference: Logits, labels: NDArray[np.int64]) -> None:
        if not labels.size:
            return
        self.predictions.append(logits.argmax(-1))
        self.margins.append(_margins(logits))
        # np.maximum keeps a NaN, where Python's max would lose it.
        self.difference = float(np.maximum(self.difference, np.abs(logits - reference).max()))
        given, wanted = torch.from_numpy(logits), torch.from_numpy(labels)
        if wanted.is_floating_point():
            self.loss += functional.mse_loss(given[:, 0], wanted, reduction="sum").item()
        else:
            self.loss += functional.cross_entropy(given, wanted, reduction="sum").item()

    def close(self, labels: NDArray[np.int64], compute_metrics: ComputeMetrics, reader: Reader | None) -> Evaluation:
        loss = self.loss / (labels != IGNORED).sum()
        if reader is not None:
            return self._close_read(reader.read(np.concatenate(self.logits)), loss)
        predictions, references = np.concatenate(self.predictions), labels[labels != IGNORED]
        shaped = labels.copy()
        shaped[labels != IGNORED] = predictions  # kept row by row, so they come back in their order
        return Evaluation(
            metrics=_named(compute_metrics(shaped, labels), loss),
            flips=0,
            total=references.size,
            max_abs_logit_difference=self.difference,
            predictions=predictions,
            margins=np.concatenate(self.margins),
            references=references,
            errors=(predictions != references).astype(np.float64),
        )

    def _close_read(self, found: Predictions, loss: float) -> Evaluation:
        return Evaluation(
            metrics=_named(found.metrics, loss),
            flips=0,
            total=len(found.values),
            max_abs_logit_difference=self.difference,
            predictions=found.values,
            margins=found.margins,
            references=found.references,
            errors=found.errors,
            tolerance=found.tolerance,
        )


def _named(metrics: Mapping[str, float], loss: float) -> dict[str, float]:
    return {**{name: float(value) for name, value in metrics.items()}, "loss": float(loss)}


def _stacked(batches: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The labels of all batches, those of shorter ones filled up with -100."""
    if not batches or batches[0].ndim == 1:
        return np.concatenate(batches) if batches else np.empty(0, dtype=np.int64)
    longest = max(labels.shape[1] for labels in batches)
    filled = [((0, 0), (0, longest - labels.shape[1])) for labels in batches]
    return np.concatenate(
        [np.pad(labels, widths, constant_values=IGNORED) for labels, widths in zip(batches, filled, strict=True)]
    )


def _margins(logits: Logits) -> NDArray[np.float64]:
    """logits: (examples, classes). Returns (examples,) the largest probability less the second."""
    ordered = np.partition(logits.astype(np.float64), -2) if logits.shape[-1] > 1 else logits
    first = ordered[:, -1]
    second = ordered[:, -2] if logits.shape[-1] > 1 else np.full_like(first, -np.inf)
    with np.errstate(invalid="ignore"):  # logits that are not finite: the margin is NaN, and so is the loss
        return (1 - np.exp(second - first)) / np.exp(logits - first[:, None]).sum(-1)


def _labels(batch: Mapping[str, Any], reader: Reader | None) -> NDArray[Any]:
    if "labels" not in batch:
        raise InputError(f"the evaluation data has no labels, only {', '.join(batch)}")
    labels = np.asarray(batch["labels"])
    if np.issubdtype(labels.dtype, np.integer):
        return labels.astype(np.int64)
    if reader is None:
        raise InputError(f"labels must be class numbers, these are {labels.dtype}")
    return labels.astype(np.float32)
