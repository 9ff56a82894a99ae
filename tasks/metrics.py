"""Metrics as local `evaluate` modules: `evaluate.load` would ask the hub for them."""

import re
import string
from collections import Counter
from collections.abc import Iterator
from typing import Any

import datasets
import evaluate
import numpy as np

IGNORED = -100  # the label of what is not asked
UNLABELED = -101  # the label of what is asked, but of the teacher alone
FEATURES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
TEXT_FEATURES = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})

SCORED_LABELS = datasets.Features(
    {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.List(datasets.Value("int64"))}
)
NUMBERS = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("float64")})


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


class MultiLabelF1(evaluate.Metric):
    """F1 over all labels of all texts together (micro), and its mean over the labels that occur (macro), from 0 to 1.

    Predictions are scores, above 0 where a label is predicted; references are 0 and 1, both one a label.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=SCORED_LABELS)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, true = np.asarray(predictions) > 0, np.asarray(references) == 1
        hits, seen = (predicted & true).sum(0), predicted.sum(0) + true.sum(0)
        return {
            "f1_micro": float(2 * hits.sum() / max(seen.sum(), 1)),
            "f1_macro": float(np.mean(2 * hits[seen > 0] / seen[seen > 0])) if seen.any() else 0.0,
        }


class AveragePrecision(evaluate.Metric):
    """Mean over the labels that occur of the precision at each text that has one, texts ranked by score, from 0 to 1.

    Texts of equal score are ranked together, so that their order does not matter. No threshold is involved.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=SCORED_LABELS)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        scores, true = np.asarray(predictions), np.asarray(references) == 1
        each = [_average_precision(s, t) for s, t in zip(scores.T, true.T, strict=True) if t.any()]
        return {"average_precision": float(np.mean(each)) if each else 0.0}


class Correlation(evaluate.Metric):
    """How far numbers rise with their references, from -1 to 1: linearly (Pearson), and in rank (Spearman).

    0 where all of the one or of the other are the same.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=NUMBERS)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, true = np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)
        return {"pearson": _correlation(predicted, true), "spearman": _correlation(_ranks(predicted), _ranks(true))}


class MeanSquaredError(evaluate.Metric):
    """Mean squared difference of numbers from their references."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=NUMBERS)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"mse": float(np.mean(np.square(np.asarray(predictions) - np.asarray(references))))}


def _average_precision(scores: Any, true: Any) -> float:
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(scores[order][1:] != scores[order][:-1], True)
    hits = np.cumsum(true[order])[last_of_ties]
    precision = hits / (np.flatnonzero(last_of_ties) + 1)
    return float(np.sum(np.diff(hits, prepend=0) * precision) / hits[-1])


def _correlation(one: Any, other: Any) -> float:
    one, other = one - one.mean(), other - other.mean()
    spread = float(np.sqrt(np.square(one).sum() * np.square(other).sum()))
    return float((one * other).sum() / spread) if spread else 0.0


def _ranks(values: Any) -> Any:
    """Places in ascending order; those of equal values are averaged."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


class EntityF1(evaluate.Metric):
    """Precision, recall and F1 of named entities in IOB2 tags, from 0 to 1.

    An entity counts where type, first and last word are all right, as the CoNLL-2003 shared task counts
    (arXiv:cs/0306050): an `I-` tag that follows no entity of its type begins one. Micro averages, over the entities
    of all sentences; a share of nothing is 0. Predictions and references are lists of tags, one list a sentence.
    """

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        features = datasets.Features({"predictions": tags, "references": tags})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        found, true = (
            {(number, *entity) for number, tags in enumerate(sentences) for entity in _entities(tags)}
            for sentences in (predictions, references)
        )
        hits = len(found & true)
        return {
            "precision": hits / max(len(found), 1),
            "recall": hits / max(len(true), 1),
            "f1": 2 * hits / max(len(found) + len(true), 1),
        }


def _entities(tags: list[str]) -> Iterator[tuple[str, int, int]]:
    """Type, first word and the word after the last of each entity in one sentence."""
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and (prefix != "I" or name != kind):
            yield kind, start, place
            kind = ""
        if prefix != "O" and not kind:
            start, kind = place, name


class RougeL(evaluate.Metric):
    """How much of the words of a text and of its reference is one common subsequence, from 0 to 1.

    The mean over texts of the harmonic mean of its shares of the two lengths, in lower-case letters and digits
    (Lin, ROUGE: https://aclanthology.org/W04-1013; sentence-level ROUGE-L with equal weights).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=TEXT_FEATURES)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        scores = [_rouge_l(*map(_words, pair)) for pair in zip(predictions, references, strict=True)]
        return {"rougeL": float(np.mean(scores))}


class ExactMatch(evaluate.Metric):
    """Share of texts that equal their reference, blanks at the ends aside, from 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=TEXT_FEATURES)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        equal = [text.strip() == true.strip() for text, true in zip(predictions, references, strict=True)]
        return {"exact_match": float(np.mean(equal))}


class AnswerMatch(evaluate.Metric):
    """Share of answers that match a reference exactly, and mean F1 of their words, from 0 to 1.

    As SQuAD counts (arXiv:1606.05250): case, punctuation, articles and white space do not matter, and of several
    references the nearest counts. Where there is none, "" is right (arXiv:1806.03822). Predictions are texts,
    references lists of texts.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.List(text)})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": float(np.mean([matches(*pair) for pair in pairs])),
            "f1": float(np.mean([max(_answer_f1(answer, text) for text in right or [""]) for answer, right in pairs])),
        }


def matches(answer: str, references: list[str]) -> bool:
    """Whether an answer is right, as `AnswerMatch` counts."""
    return any(_answer_words(answer) == _answer_words(reference) for reference in references or [""])


def _answer_words(answer: str) -> list[str]:
    """An answer's words, without case, punctuation and articles."""
    plain = "".join(character for character in answer.lower() if character not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _answer_f1(answer: str, reference: str) -> float:
    ours, theirs = _answer_words(answer), _answer_words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))


def compute(metrics: list[type[evaluate.Metric]], predictions: Any, references: Any) -> dict[str, float]:
    """All metrics of one set of predictions, by name.

    Args:
        metrics: Metric classes of this module.
        predictions: (examples,) predicted class indices, or what else the metrics compare.
        references: (examples,) true class indices, or as above.
    """
    results: dict[str, float] = {}
    for metric in metrics:
        results |= metric(keep_in_memory=True).compute(predictions=predictions, references=references)
    return results


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _rouge_l(predicted: list[str], true: list[str]) -> float:
    # lengths[i]: of the longest subsequence that the words read so far share with the first i true words.
    lengths = [0] * (len(true) + 1)
    for word in predicted:
        before = 0
        for i, other in enumerate(true, start=1):
            before, lengths[i] = lengths[i], before + 1 if word == other else max(lengths[i], lengths[i - 1])
    return 2 * lengths[-1] / (len(predicted) + len(true)) if lengths[-1] else 0.0
