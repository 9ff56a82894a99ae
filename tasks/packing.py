"""Text packed into full blocks of tokens: what language models are trained on."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks import loading, metrics
from prunelle.tasks.arguments import DataArguments
from prunelle.tasks.loading import find_column, load_splits, where

TEXT_NAMES = ("text", "content", "sentence", "document", "body")

# Packing drops what does not fill a block at the end of each batch of texts: a large batch loses little.
TEXTS_PACKED_TOGETHER = 10_000


class PackedTexts:
    """The texts, their column found and checked; see `tasks.Task` for the verbs.

    Args:
        arguments: Where the data is.
        seed: Draws the validation data where none is given, and whatever else a language model's task draws.

    Raises:
        InputError: Data that cannot be read or is empty, a column that is not there.
    """

    def __init__(self, arguments: DataArguments, seed: int) -> None:
        self.arguments = arguments
        self.seed = seed
        self.splits: dict[str, Any] = {}
        for split, rows in load_splits(arguments, seed).items():
            place = where(arguments, split)
            text = find_column(rows, arguments.text_column_name, TEXT_NAMES, "text_column_name", place)
            self.splits[split] = rows.select_columns([text]).rename_columns({text: "text"} if text != "text" else {})

    def fingerprint(self, unlabeled: bool = True) -> str:
        """A hash of the data, with or without what is unlabeled, and of how it is prepared."""
        return loading.fingerprint(self.splits, self.arguments, unlabeled)

    def texts(self, splits: Sequence[str] = ("train",)) -> Any:
        """The texts that tokenizers are to read, of the training data or of the splits named."""
        return (row["text"] for split in splits for row in self.splits[split] if row["text"])

    def configure(self, config: PreTrainedConfig) -> None:
        """A language model's head is as large as its vocabulary: nothing to add."""

    def adopt(self, config: PreTrainedConfig, model_name: str) -> None:
        """A language model predicts its own vocabulary: nothing to take over."""

    def pack(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The splits as full blocks of `input_ids`.

        Raises:
            InputError: The text does not fill one block.
        """
        blocks = {split: self._pack(rows, tokenizer) for split, rows in self.splits.items()}
        for split, packed in blocks.items():
            if isinstance(packed, datasets.Dataset) and len(packed) == 0:
                raise InputError(
                    f"{where(self.arguments, split)} does not fill one block of {self.arguments.max_seq_length} "
                    "tokens: give more text or a smaller --max_seq_length"
                )
        return blocks

    @staticmethod
    def compute_metrics(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        asked = references != metrics.IGNORED
        return metrics.compute([metrics.Accuracy], predictions[asked], references[asked])

    def _pack(self, rows: Any, tokenizer: Tokenizer) -> Any:
        before, after = _special_tokens_around(tokenizer)
        between = [t for t in (tokenizer.sep_token_id, tokenizer.eos_token_id) if t is not None][:1]
        room = self.arguments.max_seq_length - len(before) - len(after)

        def pack(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [text for text in batch["text"] if text and text.strip()]
            if not texts:
                return {"input_ids": []}
            documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            tokens = list(chain.from_iterable(document + between for document in documents))
            starts = range(0, len(tokens) - room + 1, room)
            return {"input_ids": [before + tokens[start : start + room] + after for start in starts]}

        description = {} if isinstance(rows, datasets.IterableDataset) else {"desc": "Packing"}
        return rows.map(pack, batched=True, batch_size=TEXTS_PACKED_TOGETHER, remove_columns=["text"], **description)


def _special_tokens_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, such as [CLS] and [SEP]."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return ids[:first], ids[last:]
