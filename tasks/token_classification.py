"""Token classification: one tag a word, such as the names of entities."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks import metrics
from prunelle.tasks.arguments import DataArguments
from prunelle.tasks.classes import Classification, check_known, class_values
from prunelle.tasks.loading import find_column, load_splits, where
from prunelle.tasks.metrics import IGNORED, UNLABELED
from prunelle.tasks.pretrained_tokenizer import check_padding
from prunelle.tasks.several_tokenizers import PLACES, AnyTokens

logger = logging.getLogger(__name__)

TOKEN_NAMES = ("tokens", "words", "text")
TAG_NAMES = ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags")
IOB2 = re.compile(r"O|[BI]-.+", re.S)


class TokenClassification(Classification, AnyTokens):
    """The words and their tags, found and checked; see `tasks.Task` for the verbs.

    Each word's tag is asked at the first of its tokens, and nothing at the others.

    Args:
        arguments: Where the data is.
        seed: Draws the validation data where none is given.

    Raises:
        InputError: Data that cannot be read or is empty, a column that is not there or holds no lists, an example
            without words, more or fewer tags than words, fewer than two tags, a tag in validation or test data
            that training never saw.
    """

    auto_model_class = AutoModelForTokenClassification

    def __init__(self, arguments: DataArguments, seed: int) -> None:
        self.arguments = arguments
        self.splits = {}
        for split, rows in load_splits(arguments, seed).items():
            place = where(arguments, split)
            tokens = find_column(rows, arguments.text_column_name, TOKEN_NAMES, "text_column_name", place)
            if split == "unlabeled":
                _check_lists(rows, [tokens], place)
                self.splits[split] = rows.select_columns([tokens]).rename_columns({tokens: "tokens"})
                _check_words(self.splits[split], tokens, place)
                continue
            tags = find_column(rows, arguments.label_column_name, TAG_NAMES, "label_column_name", place)
            if tokens == tags:
                raise InputError(f"column {tokens!r} cannot be both the words and the tags: give --label_column_name")
            _check_lists(rows, [tokens, tags], place)
            rows = rows.select_columns([tokens, tags]).rename_columns({tokens: "tokens", tags: "tags"})
            _check_words(rows, tokens, place)
            _check_complete(rows, tokens, tags, place)
            labels = rows["tags"][:]
            if split == "train":
                kind = rows.features["tags"].feature
                names = kind.names if isinstance(kind, datasets.ClassLabel) else None
                found = {tag for example in labels for tag in example}
                values = class_values(found, tags, place) if names is None else list(range(len(names)))
                self.learn_classes(values, names)
            else:
                check_known(labels, list(self.class_index), place)
            self.splits[split] = rows

    def texts(self, splits: Sequence[str] = ("train",)) -> Any:
        """The texts that tokenizers are to read, of the training data or of the splits named."""
        return (" ".join(tokens) for split in splits for tokens in self.splits[split]["tokens"])

    def encode(self, tokenizer: Tokenizer, others: Mapping[str, Tokenizer] | None = None) -> dict[str, Any]:
        """The splits as `input_ids`, `attention_mask` (… as the tokenizer gives them) and `labels`, one a token.

        Words of what is unlabeled have the label -101, which losses on labels leave out.

        Args:
            others: as `AnyTokens` has them. A word is asked for where each tokenizer has a token of it; the column
                `places` says where.

        Raises:
            InputError: A tokenizer cannot say which word a token belongs to.
        """
        others = others or {}
        for each in (tokenizer, *others.values()):
            if not each.is_fast:
                raise InputError(
                    f"the tokenizer {each.name_or_path} does not say which word a token belongs to: "
                    "--task token-classification needs a fast one"
                )
        return {split: self._encode_split(split, rows, tokenizer, others) for split, rows in self.splits.items()}

    def collator(self, tokenizer: Tokenizer, encoded: dict[str, datasets.Dataset]) -> Any:
        """Pads each batch to its longest example, the labels too."""
        check_padding(tokenizer)
        return DataCollatorForTokenClassification(tokenizer)

    def compute_metrics(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """Accuracy over words, and F1: of whole entities where the tags are IOB2, else over the tags."""
        asked = references != IGNORED
        if not all(IOB2.fullmatch(name) for name in self.class_names):
            return metrics.compute([metrics.Accuracy, metrics.MacroF1], predictions[asked], references[asked])
        names = np.array(self.class_names, dtype=object)
        sentences = [
            [names[row[where]].tolist() for row, where in zip(numbers, asked, strict=True)]
            for numbers in (predictions, references)
        ]
        return {
            **metrics.compute([metrics.EntityF1], *sentences),
            **metrics.compute([metrics.Accuracy], predictions[asked], references[asked]),
        }

    def _encode_split(
        self, split: str, rows: datasets.Dataset, tokenizer: Tokenizer, others: Mapping[str, Tokenizer]
    ) -> datasets.Dataset:
        length = self.arguments.max_seq_length

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            ours, *theirs = (
                each(batch["tokens"], is_split_into_words=True, truncation=True, max_length=length)
                for each in (tokenizer, *others.values())
            )
            columns = {**ours, "labels": [[IGNORED] * len(tokens) for tokens in ours["input_ids"]]}
            for prefix, their in zip(others, theirs, strict=True):
                columns |= {prefix + name: values for name, values in their.items()}
                columns[prefix + PLACES] = [[0] * len(tokens) for tokens in ours["input_ids"]]
            tags = batch["tags"] if "tags" in batch else [None] * len(batch["tokens"])
            for number, known in enumerate(tags):
                first, *firsts = (_first_tokens(each.word_ids(number)) for each in (ours, *theirs))
                for word, place in first.items():
                    if any(word not in each for each in firsts):
                        continue
                    label = UNLABELED if known is None else self.class_index[known[word]]
                    columns["labels"][number][place] = label
                    for prefix, each in zip(others, firsts, strict=True):
                        columns[prefix + PLACES][number][place] = each[word]
            return columns

        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}")
        words = sum(map(len, rows["tokens"]))
        asked = sum(label != IGNORED for labels in encoded["labels"] for label in labels)
        if asked < words:
            logger.warning(
                "%s: %d of %d words have no token within --max_seq_length %d; they are not learned or scored",
                where(self.arguments, split), words - asked, words, length,
            )  # fmt: skip
        return encoded


def _first_tokens(words: Sequence[int | None]) -> dict[int, int]:
    """Of the word of each token: of each word the place of its first."""
    return {word: place for place, word in reversed(list(enumerate(words))) if word is not None}


def _check_lists(rows: datasets.Dataset, columns: Sequence[str], place: str) -> None:
    for column in columns:
        if not isinstance(rows.features[column], datasets.List):
            raise InputError(
                f"{place}: column {column!r} holds no lists; token classification wants a list of words and one of "
                "tags in each example, as JSON lines and Parquet can hold them"
            )


def _check_words(rows: datasets.Dataset, column: str, place: str) -> None:
    for number, words in enumerate(rows["tokens"], start=1):
        if not words:
            raise InputError(f"{place}, example {number}: column {column!r} holds no words")
        for word in words:
            if not isinstance(word, str):
                raise InputError(f"{place}, example {number}: column {column!r} holds no word but {word!r}")


def _check_complete(rows: datasets.Dataset, tokens: str, tags: str, place: str) -> None:
    for number, (words, labels) in enumerate(zip(rows["tokens"], rows["tags"], strict=True), start=1):
        if len(words) != len(labels or []):
            raise InputError(
                f"{place}, example {number}: {len(words)} words in column {tokens!r} and {len(labels or [])} tags in "
                f"column {tags!r}; each word has one"
            )
        for label in labels:
            if label is None or label == "":
                raise InputError(f"{place}, example {number}: column {tags!r} holds no tag but {label!r}")
