"""Masked language modelling on text packed into full blocks."""

from itertools import chain, islice
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoModelForMaskedLM, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks import loading, metrics
from prunelle.tasks.arguments import DataArguments
from prunelle.tasks.loading import find_column, load_splits, where
from prunelle.tasks.masking import FrequencySmoothedMasking, count_tokens

TEXT_NAMES = ("text", "content", "sentence", "document", "body")

# Packing drops what does not fill a block at the end of each batch of texts: a large batch loses little.
TEXTS_PACKED_TOGETHER = 10_000
STREAMED_BLOCKS_COUNTED = 20_000


class MaskedLanguageModelling:
    """The texts, their column found and checked; see `tasks.Task` for the verbs.

    Args:
        arguments: Where the data is.
        seed: Draws the validation data where none is given, and the masks of the evaluation data.

    Raises:
        InputError: Data that cannot be read or is empty, a column that is not there.
    """

    auto_model_class = AutoModelForMaskedLM

    def __init__(self, arguments: DataArguments, seed: int) -> None:
        self.arguments = arguments
        self.seed = seed
        self.splits: dict[str, Any] = {}
        for split, rows in load_splits(arguments, seed).items():
            place = where(arguments, split)
            text = find_column(rows, arguments.text_column_name, TEXT_NAMES, "text_column_name", place)
            self.splits[split] = rows.select_columns([text]).rename_columns({text: "text"} if text != "text" else {})

    def fingerprint(self) -> str:
        """A hash of the data and of how it is prepared."""
        return loading.fingerprint(self.splits, self.arguments)

    def texts(self) -> Any:
        """The training texts, for a tokenizer to be trained on."""
        return (row["text"] for row in self.splits["train"] if row["text"])

    def configure(self, config: PreTrainedConfig) -> None:
        """A masked language model's head is as large as its vocabulary: nothing to add."""

    def adopt(self, config: PreTrainedConfig, model_name: str) -> None:
        """A masked language model predicts its own vocabulary: nothing to take over."""

    def encode(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The splits as full blocks of `input_ids`; validation and test masked once and for all, with `labels`.

        Raises:
            InputError: The tokenizer has no mask token, or the text does not fill one block.
        """
        if tokenizer.mask_token_id is None:
            raise InputError(f"the tokenizer {tokenizer.name_or_path} has no mask token; --task masked-lm needs one")
        blocks = {split: self._pack(rows, tokenizer) for split, rows in self.splits.items()}
        for split, packed in blocks.items():
            if isinstance(packed, datasets.Dataset) and len(packed) == 0:
                raise InputError(
                    f"{where(self.arguments, split)} does not fill one block of {self.arguments.max_seq_length} "
                    "tokens: give more text or a smaller --max_seq_length"
                )
        masking = self.collator(tokenizer, blocks)
        masking.generator = torch.Generator().manual_seed(self.seed)
        return {
            split: packed if split == "train" else datasets.Dataset.from_list([_row(masking([e])) for e in packed])
            for split, packed in blocks.items()
        }

    def collator(self, tokenizer: Tokenizer, encoded: dict[str, Any]) -> FrequencySmoothedMasking:
        """Masks anew each time a block is seen; rare tokens by their frequency in the encoded training data."""
        counted = (row["input_ids"] for row in islice(encoded["train"], STREAMED_BLOCKS_COUNTED))
        return FrequencySmoothedMasking(
            tokenizer,
            count_tokens(counted, len(tokenizer)),
            self.arguments.mlm_probability,
            self.arguments.mask_frequency_exponent,
        )

    @staticmethod
    def compute_metrics(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return metrics.compute([metrics.Accuracy], predictions, references)

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


def _row(batch: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: tensor[0].tolist() for name, tensor in batch.items()}
