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
from prunelle.tasks import Answers

IGNORED = -100  # the label of a position that is not scored, as everywhere in the field

ComputeMetrics = Callable[[Any, Any], Mapping[str, float]]
ReadAnswers = Callable[[Logits], Answers]


@dataclass
class Evaluation:
    """What one model did with the data.

    Attributes:
        metrics: what `compute_metrics` gave, and `loss`, the mean cross-entropy in nats.
        flips: how many predictions differ from the reference model's.
        total: how many predictions there were.
        max_abs_logit_difference: the largest difference of a logit from the reference model's.
        predictions: (total,) the predicted classes, or the answers as text.
        margins: (total,) how sure each prediction was, from 0 to 1: its probability less the next one's.
        references: (total,) the true classes, or the right answers, one beside the other.
        errors: (total,) 0 for what is right, 1 for what is not.
    """

    metrics: dict[str, float]
    flips: int
    total: int
    max_abs_logit_difference: float
    predictions: NDArray[Any]
    margins: NDArray[np.float64]
    references: NDArray[Any]
    errors: NDArray[np.float64]


def evaluate(
    runners: Sequence[Runner],
    batches: Iterable[Batch],
    compute_metrics: ComputeMetrics,
    *,
    reference: Runner,
    answers: ReadAnswers | None = None,
) -> list[Evaluation]:
    """Runs all models batch by batch over the same data, once, and keeps predictions, not logits.

    Args:
        runners: the models, `reference` among them.
        batches: mappings of tensors with the models' inputs and `labels`, class numbers of shape (batch,)
            or (batch, length). Positions labelled -100 are left out. Position i of the labels is scored
            against position i of the logits: a causal model's labels must be shifted beforehand.
        compute_metrics: predictions and references to named figures, both of the labels' shape over all batches:
            (examples,), or (examples, length) with -100 where nothing is scored; or texts and lists of texts, where
            `answers` are read.
        reference: the model that flips and logit differences are counted against.
        answers: reads (windows, 2, length) logits as the answers to questions. Logits are kept for it, and the labels
            of each window are two, the tokens where the answer starts and ends.

    Raises:
        InputError: no labels, labels that are not class numbers of the models, or logits of other shapes.
    """
    tallies = [_Tally() for _ in runners]
    ordered = sorted(zip(runners, tallies, strict=True), key=lambda pair: pair[0] is not reference)
    references: list[NDArray[np.int64]] = []
    for batch in batches:
        labels = _labels(batch)
        scored = labels != IGNORED
        kept_labels = labels[scored]
        references.append(labels)
        reference_logits: Logits | None = None
        for runner, tally in ordered:
            logits = runner(batch)
            if answers is not None:
                logits = logits.swapaxes(1, 2)
            if logits.shape[:-1] != labels.shape:
                raise InputError(
                    f"{runner.name} gives logits of shape {logits.shape} for labels of shape {labels.shape}"
                )
            if kept_labels.size and not 0 <= kept_labels.min() <= kept_labels.max() < logits.shape[-1]:
                raise InputError(f"a label is not among the {logits.shape[-1]} classes of {runner.name}")
            if answers is not None:
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
    results = [tally.close(every, compute_metrics, answers) for tally in tallies]
    (original,) = (result for result, runner in zip(results, runners, strict=True) if runner is reference)
    for result in results:
        result.flips = int((result.predictions != original.predictions).sum())
    return results


@dataclass
class _Tally:
    """One model's running sums."""

    predictions: list[NDArray[np.int64]] = field(default_factory=list)
    margins: list[NDArray[np.float64]] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)
    cross_entropy: float = 0.0
    difference: float = 0.0

    def add(self, logits: Logits, reference: Logits, labels: NDArray[np.int64]) -> None:
        if not labels.size:
            return
        self.predictions.append(logits.argmax(-1))
        self.margins.append(_margins(logits))
        # np.maximum keeps a NaN, where Python's max would lose it.
        self.difference = float(np.maximum(self.difference, np.abs(logits - reference).max()))
        self.cross_entropy += functional.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(labels), reduction="sum"
        ).item()

    def close(
        self, labels: NDArray[np.int64], compute_metrics: ComputeMetrics, answers: ReadAnswers | None
    ) -> Evaluation:
        loss = self.cross_entropy / (labels != IGNORED).sum()
        if answers is not None:
            return self._close_answers(answers(np.concatenate(self.logits)), compute_metrics, loss)
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

    def _close_answers(self, found: Answers, compute_metrics: ComputeMetrics, loss: float) -> Evaluation:
        return Evaluation(
            metrics=_named(compute_metrics(found.texts, found.references), loss),
            flips=0,
            total=len(found.texts),
            max_abs_logit_difference=self.difference,
            predictions=np.array(found.texts, dtype=object),
            margins=found.margins,
            references=np.array([" / ".join(right) for right in found.references], dtype=object),
            errors=1.0 - found.matches,
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


def _labels(batch: Mapping[str, Any]) -> NDArray[np.int64]:
    if "labels" not in batch:
        raise InputError(f"the evaluation data has no labels, only {', '.join(batch)}")
    labels = np.asarray(batch["labels"])
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels must be class numbers, these are {labels.dtype}")
    return labels.astype(np.int64)
