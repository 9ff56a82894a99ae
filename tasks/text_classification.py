"""Text classification: one label a text."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks import loading, metrics
from prunelle.tasks.arguments import DataArguments
from prunelle.tasks.loading import find_column, load_splits, where

logger = logging.getLogger(__name__)

IGNORED = -100

TEXT_NAMES = ("text", "sentence", "content", "review", "document", "body")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent")


class TextClassification:
    """The labelled texts, their columns and labels found and checked; see `tasks.Task` for the verbs.

    Args:
        arguments: Where the data is.
        seed: Draws the validation data where none is given.

    Raises:
        InputError: Data that cannot be read or is empty, a column that is not there, a missing text or label,
            fewer than two labels, a label in validation or test data that training never saw.
    """

    auto_model_class = AutoModelForSequenceClassification

    def __init__(self, arguments: DataArguments, seed: int) -> None:
        self.arguments = arguments
        self.splits: dict[str, Any] = {}
        self.class_index: dict[Any, int] = {}
        for split, rows in load_splits(arguments, seed).items():
            place = where(arguments, split)
            text = find_column(rows, arguments.text_column_name, TEXT_NAMES, "text_column_name", place)
            if split == "unlabeled":
                _check_texts(rows[text], text, place)
                self.splits[split] = datasets.Dataset.from_dict({"text": rows[text]})
                continue
            label = find_column(rows, arguments.label_column_name, LABEL_NAMES, "label_column_name", place)
            rows = _text_and_label(rows, text, label)
            if split == "test" and _is_named(rows) and set(rows["label"]) == {-1}:
                logger.warning("%s has no labels (all are -1) and is left out", place)
                continue
            _check_complete(rows, text, label, place)
            if split == "train":
                self.class_index = {value: index for index, value in enumerate(_label_values(rows, label, place))}
            else:
                _check_known(rows, list(self.class_index), place)
            self.splits[split] = rows
        train = self.splits["train"]
        self.data_is_unnamed = not _is_named(train) and all(isinstance(value, int) for value in self.class_index)
        self.class_names: list[str] = (
            train.features["label"].names if _is_named(train) else [str(value) for value in self.class_index]
        )

    def fingerprint(self, unlabeled: bool = True) -> str:
        """A hash of the data, with or without what is unlabeled, and of how it is prepared."""
        return loading.fingerprint(self.splits, self.arguments, unlabeled)

    def texts(self) -> Any:
        """The training texts, for a tokenizer to be trained on."""
        return self.splits["train"]["text"]

    def configure(self, config: PreTrainedConfig) -> None:
        """Give a model whose head is still to be trained this task's classes."""
        config.num_labels = len(self.class_names)
        config.id2label = dict(enumerate(self.class_names))
        config.label2id = {name: index for index, name in enumerate(self.class_names)}

    def adopt(self, config: PreTrainedConfig, model_name: str) -> None:
        """Take over the classes, and their order, of a model whose head is trained already.

        Labels are matched by name, whatever the case. Bare numbers in the data, or a model whose classes are
        called LABEL_0, LABEL_1, …, are matched by number.

        Raises:
            InputError: The model lacks one of the labels.
        """
        classes = {str(name).lower(): int(index) for index, name in config.id2label.items()}
        model_is_unnamed = set(classes) == {f"label_{index}" for index in range(len(classes))}
        if all(name.lower() in classes for name in self.class_names):
            indices = [classes[name.lower()] for name in self.class_names]
        elif (self.data_is_unnamed or model_is_unnamed) and set(self.class_index) <= set(range(len(classes))):
            indices = list(self.class_index)
        else:
            raise InputError(
                f"{model_name} predicts {', '.join(map(str, config.id2label.values()))}, but "
                f"{where(self.arguments, 'train')} is labelled {', '.join(self.class_names)}: they must be the same"
            )
        self.class_index = dict(zip(self.class_index, indices, strict=True))
        self.class_names = [str(config.id2label[index]) for index in range(len(classes))]

    def encode(self, tokenizer: Tokenizer) -> dict[str, datasets.Dataset]:
        """The splits as `input_ids`, `attention_mask` (… as the tokenizer gives them) and `labels`.

        What is unlabeled has the label -100, which losses on labels leave out.
        """
        length = self.arguments.max_seq_length

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            encoded = tokenizer(batch["text"], truncation=True, max_length=length)
            if "label" not in batch:
                return {**encoded, "labels": [IGNORED] * len(batch["text"])}
            return {**encoded, "labels": [self.class_index[value] for value in batch["label"]]}

        return {
            split: rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}")
            for split, rows in self.splits.items()
        }

    def collator(self, tokenizer: Tokenizer, encoded: dict[str, datasets.Dataset]) -> Any:
        """Pads each batch to its longest text."""
        return DataCollatorWithPadding(tokenizer)

    @staticmethod
    def compute_metrics(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return metrics.compute([metrics.Accuracy, metrics.MacroF1], predictions, references)


def _is_named(rows: datasets.Dataset) -> bool:
    """Hub data sets name their classes; files hold bare values."""
    return isinstance(rows.features["label"], datasets.ClassLabel)


def _text_and_label(rows: datasets.Dataset, text: str, label: str) -> datasets.Dataset:
    if text == label:
        raise InputError(f"column {text!r} cannot be both the text and the label: give --label_column_name")
    return rows.select_columns([text, label]).rename_columns({text: "text", label: "label"})


def _check_texts(texts: Iterable[Any], text: str, place: str) -> None:
    for number, value in enumerate(texts, start=1):
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{place}, example {number}: column {text!r} holds no text but {value!r}")


def _check_complete(rows: datasets.Dataset, text: str, label: str, place: str) -> None:
    _check_texts(rows["text"], text, place)
    for number, target in enumerate(rows["label"], start=1):
        if target is None or target == "" or (target == -1 and _is_named(rows)):
            raise InputError(f"{place}, example {number}: column {label!r} holds no label but {target!r}")


def _label_values(rows: datasets.Dataset, label: str, place: str) -> list[Any]:
    if _is_named(rows):
        return list(range(rows.features["label"].num_classes))
    values = sorted(set(rows["label"]), key=lambda value: (str(type(value)), value))
    if any(isinstance(value, float) for value in values):
        raise InputError(f"{place}: column {label!r} holds fractions such as {values[0]}; classification wants classes")
    if len(values) < 2:
        raise InputError(f"{place}: column {label!r} holds one label only, {values[0]!r}: nothing to tell apart")
    return values


def _check_known(rows: datasets.Dataset, labels: list[Any], place: str) -> None:
    unknown = Counter(rows["label"])
    for label in labels:
        unknown.pop(label, None)
    if unknown:
        value, count = unknown.most_common(1)[0]
        number = list(rows["label"]).index(value) + 1
        raise InputError(
            f"{place}, example {number}: label {value!r} ({count} examples) does not occur in the training data, "
            f"which has: {', '.join(map(str, labels))}"
        )
