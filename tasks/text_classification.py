"""Text classification: one label a text."""

import logging
from typing import Any

import datasets
import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks import metrics
from prunelle.tasks.arguments import DataArguments
from prunelle.tasks.classes import Classification, check_known, class_values
from prunelle.tasks.loading import check_texts, find_column, load_splits, where
from prunelle.tasks.metrics import IGNORED

logger = logging.getLogger(__name__)

TEXT_NAMES = ("text", "sentence", "content", "review", "document", "body")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent")


class TextClassification(Classification):
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
        self.splits = {}
        for split, rows in load_splits(arguments, seed).items():
            place = where(arguments, split)
            text = find_column(rows, arguments.text_column_name, TEXT_NAMES, "text_column_name", place)
            if split == "unlabeled":
                check_texts(rows[text], text, place)
                self.splits[split] = datasets.Dataset.from_dict({"text": rows[text]})
                continue
            label = find_column(rows, arguments.label_column_name, LABEL_NAMES, "label_column_name", place)
            rows = _text_and_label(rows, text, label)
            if split == "test" and _is_named(rows) and set(rows["label"]) == {-1}:
                logger.warning("%s has no labels (all are -1) and is left out", place)
                continue
            _check_complete(rows, text, label, place)
            if split == "train":
                names = rows.features["label"].names if _is_named(rows) else None
                values = class_values(set(rows["label"]), label, place) if names is None else list(range(len(names)))
                self.learn_classes(values, names)
            else:
                check_known([[value] for value in rows["label"]], list(self.class_index), place)
            self.splits[split] = rows

    def texts(self) -> Any:
        """The training texts, for a tokenizer to be trained on."""
        return self.splits["train"]["text"]

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


def _check_complete(rows: datasets.Dataset, text: str, label: str, place: str) -> None:
    check_texts(rows["text"], text, place)
    for number, target in enumerate(rows["label"], start=1):
        if target is None or target == "" or (target == -1 and _is_named(rows)):
            raise InputError(f"{place}, example {number}: column {label!r} holds no label but {target!r}")
