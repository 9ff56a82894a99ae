"""Text classification: texts and what is to be predicted of each, at its simplest one label."""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks import loading, metrics
from prunelle.tasks.arguments import DataArguments
from prunelle.tasks.choices import SINGLE_LABEL
from prunelle.tasks.classes import Classification, check_known, class_values
from prunelle.tasks.loading import check_texts, find_column, load_splits, where
from prunelle.tasks.metrics import UNLABELED
from prunelle.tasks.pretrained_tokenizer import check_padding
from prunelle.tasks.several_tokenizers import AnyTokens

logger = logging.getLogger(__name__)

TEXT_NAMES = ("text", "sentence", "content", "review", "document", "body")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent")
# The columns of texts, in the order in which they are read.
READ = ("text", "text_pair")


def text_columns(rows: datasets.Dataset, arguments: DataArguments, place: str) -> dict[str, str]:
    """Which columns hold the texts: one, or two that are read together.

    Raises:
        InputError: There is no such column, or one is given twice.
    """
    text = find_column(rows, arguments.text_column_name, TEXT_NAMES, "text_column_name", place)
    if (given := arguments.text_pair_column_name) is None:
        return {"text": text}
    pair = find_column(rows, given, (), "text_pair_column_name", place)
    if pair == text:
        raise InputError(f"column {text!r} cannot be both texts of a pair: give --text_column_name")
    return {"text": text, "text_pair": pair}


class TextTask(AnyTokens):
    """Texts or pairs of texts, each with what is to be predicted of it, checked; see `tasks.Task` for the verbs.

    Args:
        arguments: Where the data is.
        seed: Draws the validation data where none is given.

    Raises:
        InputError: Data that cannot be read or is empty, a column that is not there or has two parts to play, a missing
            text or label, labels of another kind.
    """

    auto_model_class = AutoModelForSequenceClassification
    arguments: DataArguments

    def __init__(self, arguments: DataArguments, seed: int) -> None:
        self.arguments = arguments
        self.splits: dict[str, Any] = {}
        for split, rows in load_splits(arguments, seed).items():
            place = where(arguments, split)
            columns = text_columns(rows, arguments, place)
            for text in columns.values():
                check_texts(rows[text], text, place)
            if split == "unlabeled":
                self.splits[split] = datasets.Dataset.from_dict({name: rows[text] for name, text in columns.items()})
                continue
            label = find_column(rows, arguments.label_column_name, LABEL_NAMES, "label_column_name", place)
            if label in columns.values():
                raise InputError(f"column {label!r} cannot be both the text and the label: give --label_column_name")
            columns["label"] = label
            found = {text: name for name, text in columns.items()}
            rows = rows.select_columns(list(found)).rename_columns(found)
            if self.is_labelled(rows, split, label, place):
                self.splits[split] = rows

    def is_labelled(self, rows: datasets.Dataset, split: str, column: str, place: str) -> bool:
        """Check the labels, and learn from those of the training data what there is to predict.

        Returns:
            Whether there are any.
        """
        raise NotImplementedError

    def target(self, label: Any) -> Any:
        """A label as the model is to predict it."""
        raise NotImplementedError

    def no_target(self) -> Any:
        """What stands in the place of `target` where there is no label."""
        return UNLABELED

    def fingerprint(self, unlabeled: bool = True) -> str:
        """A hash of the data, with or without what is unlabeled, and of how it is prepared."""
        return loading.fingerprint(self.splits, self.arguments, unlabeled)

    def texts(self, splits: Sequence[str] = ("train",)) -> Any:
        """The texts that tokenizers are to read, of the training data or of the splits named."""
        return chain.from_iterable(chain.from_iterable(self.readings(split)) for split in splits)

    def readings(self, split: str) -> list[tuple[str, ...]]:
        """What is read of each of a split's examples: its text, or its two texts."""
        rows = self.splits[split]
        return list(zip(*(rows[name] for name in READ if name in rows.column_names), strict=True))

    def encode(self, tokenizer: Tokenizer, others: Mapping[str, Tokenizer] | None = None) -> dict[str, Any]:
        """The splits as `input_ids`, `attention_mask` (… as the tokenizer gives them) and `labels`.

        What is unlabeled has the label -101, which losses on labels leave out.

        Args:
            others: as `AnyTokens` has them.
        """
        cut: dict[str, Any] = {"truncation": True, "max_length": self.arguments.max_seq_length}

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            read = [batch[name] for name in READ if name in batch]
            encoded: dict[str, Any] = {**tokenizer(*read, **cut)}
            for prefix, other in (others or {}).items():
                encoded |= {prefix + name: values for name, values in other(*read, **cut).items()}
            if "label" not in batch:
                return {**encoded, "labels": [self.no_target()] * len(batch["text"])}
            return {**encoded, "labels": [self.target(value) for value in batch["label"]]}

        return {
            split: rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}")
            for split, rows in self.splits.items()
        }

    def collator(self, tokenizer: Tokenizer, encoded: dict[str, datasets.Dataset]) -> Any:
        """Pads each batch to its longest text or pair."""
        check_padding(tokenizer)
        return DataCollatorWithPadding(tokenizer)


class TextClassification(TextTask, Classification):
    """One label a text."""

    problem_type = SINGLE_LABEL

    def is_labelled(self, rows: datasets.Dataset, split: str, column: str, place: str) -> bool:
        """Raises InputError: fewer than two labels, or one in validation or test data that training never saw."""
        if isinstance(rows.features["label"], datasets.List):
            raise InputError(
                f"{place}: column {column!r} holds lists: give --problem_type multi_label_classification for several "
                "labels a text"
            )
        if split == "test" and _is_named(rows) and set(rows["label"]) == {-1}:
            logger.warning("%s has no labels (all are -1) and is left out", place)
            return False
        _check_complete(rows, column, place)
        if split == "train":
            names = rows.features["label"].names if _is_named(rows) else None
            values = class_values(set(rows["label"]), column, place) if names is None else list(range(len(names)))
            self.learn_classes(values, names)
        else:
            check_known([[value] for value in rows["label"]], list(self.class_index), place)
        return True

    def target(self, label: Any) -> int:
        return self.class_index[label]

    @staticmethod
    def compute_metrics(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return metrics.compute([metrics.Accuracy, metrics.MacroF1], predictions, references)


def _is_named(rows: datasets.Dataset) -> bool:
    """Hub data sets name their classes; files hold bare values."""
    return isinstance(rows.features["label"], datasets.ClassLabel)


def _check_complete(rows: datasets.Dataset, column: str, place: str) -> None:
    for number, target in enumerate(rows["label"], start=1):
        if target is None or target == "" or (target == -1 and _is_named(rows)):
            raise InputError(f"{place}, example {number}: column {column!r} holds no label but {target!r}")
