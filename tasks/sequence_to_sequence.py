"""Sequence-to-sequence: a text becomes another text, written word by word."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks import loading, metrics
from prunelle.tasks.arguments import DataArguments
from prunelle.tasks.loading import check_texts, find_column, load_splits, where
from prunelle.tasks.metrics import IGNORED
from prunelle.tasks.pretrained_tokenizer import check_padding

TEXT_NAMES = ("text", "source", "input", "document", "article", "sentence", "content", "body")
TARGET_NAMES = ("target", "summary", "output", "highlights", "translation", "label")


class SequenceToSequence:
    """The texts and what is to be made of them, their columns found and checked; see `tasks.Task` for the verbs.

    The label at a position is the token that the decoder has to write there, having read those before it, so that
    logits and labels stand at the same positions. Teacher and student are both asked along the true target.

    Args:
        arguments: Where the data is.
        seed: Draws the validation data where none is given.

    Raises:
        InputError: Data that cannot be read or is empty, a column that is not there, a missing text or target.
    """

    auto_model_class = AutoModelForSeq2SeqLM

    def __init__(self, arguments: DataArguments, seed: int) -> None:
        self.arguments = arguments
        self.start: int | None = None
        self.splits: dict[str, Any] = {}
        for split, rows in load_splits(arguments, seed).items():
            place = where(arguments, split)
            text = find_column(rows, arguments.text_column_name, TEXT_NAMES, "text_column_name", place)
            target = find_column(rows, arguments.target_column_name, TARGET_NAMES, "target_column_name", place)
            if text == target:
                raise InputError(f"column {text!r} cannot be both the text and the target: give --target_column_name")
            for column in (text, target):
                check_texts(rows[column], column, place)
            self.splits[split] = datasets.Dataset.from_dict({"text": rows[text], "target": rows[target]})

    def fingerprint(self, unlabeled: bool = True) -> str:
        """A hash of the data and of how it is prepared."""
        return loading.fingerprint(self.splits, self.arguments, unlabeled)

    def texts(self, splits: Sequence[str] = ("train",)) -> Any:
        """The texts and targets that tokenizers are to read, of the training data or of the splits named."""
        texts = (self.arguments.source_prefix + text for split in splits for text in self.splits[split]["text"])
        return chain(texts, chain.from_iterable(self.splits[split]["target"] for split in splits))

    def configure(self, config: PreTrainedConfig) -> None:
        """Give a model from scratch the token that its decoder starts from: its teacher's; of a first model, what its
        kind of configuration says (BART's do), else the padding, as T5."""
        if self.start is not None:
            config.decoder_start_token_id = self.start
        elif getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = config.pad_token_id
        self.start = config.decoder_start_token_id

    def adopt(self, config: PreTrainedConfig, model_name: str) -> None:
        """Take over the token that a model's decoder starts from.

        Raises:
            InputError: The model does not say it.
        """
        self.start = getattr(config, "decoder_start_token_id", None)
        if self.start is None:
            raise InputError(f"{model_name} does not say its decoder_start_token_id: sequence-to-sequence needs one")

    def encode(self, tokenizer: Tokenizer) -> dict[str, datasets.Dataset]:
        """The splits as `input_ids`, `attention_mask` of the text, and the target's tokens as `labels`."""
        arguments = self.arguments

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [arguments.source_prefix + text for text in batch["text"]]
            encoded = tokenizer(texts, truncation=True, max_length=arguments.max_seq_length)
            targets = tokenizer(text_target=batch["target"], truncation=True, max_length=arguments.max_target_length)
            return {**encoded, "labels": targets["input_ids"]}

        return {
            split: rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}")
            for split, rows in self.splits.items()
        }

    def collator(self, tokenizer: Tokenizer, encoded: dict[str, datasets.Dataset]) -> Any:
        """Pads texts and targets each to the longest of a batch, and shows the decoder what stands before.

        Beside `input_ids`, `attention_mask` and `labels` (-100 where padded) it gives `decoder_input_ids`, the labels
        moved on by one behind the token that the decoder starts from, and their `decoder_attention_mask`.
        """
        check_padding(tokenizer)
        assert self.start is not None  # a model was loaded or made before
        start, padding = self.start, tokenizer.pad_token_id

        def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            targets = [torch.tensor(example["labels"]) for example in examples]
            labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
            before = labels.roll(1, dims=1)
            before[:, 0] = start
            read = [{name: values for name, values in example.items() if name != "labels"} for example in examples]
            return {
                **tokenizer.pad(read, return_tensors="pt"),
                "decoder_input_ids": before.masked_fill(before == IGNORED, padding),
                "decoder_attention_mask": labels.ne(IGNORED).long(),
                "labels": labels,
            }

        return collate

    @staticmethod
    def compute_metrics(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """Of next tokens, each predicted from the true ones before it."""
        asked = references != IGNORED
        return metrics.compute([metrics.Accuracy], predictions[asked], references[asked])
