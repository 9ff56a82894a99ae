"""Which tokens a masked language model has to predict."""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import TrainerCallback, default_data_collator

IGNORED = -100


def count_tokens(blocks: Iterable[list[int]], vocabulary_size: int) -> Tensor:
    """How often each token occurs. Returns (vocabulary,), int64."""
    counts = torch.zeros(vocabulary_size, dtype=torch.int64)
    for block in blocks:
        counts += torch.bincount(torch.as_tensor(block), minlength=vocabulary_size)
    return counts


class FrequencySmoothedMasking(TrainerCallback):
    """Collator that chooses rare tokens more often than their share, and masks them.

    Among the ordinary tokens of each example, `probability` are drawn without replacement with weights
    count^-exponent. Of those drawn 80 % become the mask token, 10 % a random token, 10 % stay (as in BERT).
    Examples that carry `labels` are masked already (evaluation data is, once and for all) and are only stacked.

    What is drawn depends on the seed, the epoch and the example, and on nothing else: not on how batches are cut, on
    the process that collates, or on where a run was resumed. As a callback of the Trainer it is told the epoch; other
    loops call `set_epoch` before each, as for samplers.

    Args:
        tokenizer: Gives the mask token, the special tokens (never drawn) and the padding.
        counts: (vocabulary,) occurrences of each token in the training data.
        probability: Share of tokens to predict, between 0 and 1.
        exponent: 0 draws evenly; DistilBERT uses 0.7.
        seed: Another gives other masks.

    Returns (of a call):
        `input_ids`, `attention_mask` and `labels`, each (batch, tokens), the labels -100 where nothing is asked.

    Reference:
        Sanh et al., DistilBERT, arXiv:1910.01108; the exponent is that of XLM, arXiv:1901.07291.
    """

    def __init__(
        self, tokenizer: Tokenizer, counts: Tensor, probability: float = 0.15, exponent: float = 0.7, seed: int = 0
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no mask token; masked language modelling needs one")
        self.tokenizer = tokenizer
        self.mask_token_id: int = tokenizer.mask_token_id
        self.probability = probability
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that outlive an epoch
        self.weights = counts.clamp(min=1).double() ** -exponent
        self.weights[torch.as_tensor(tokenizer.all_special_ids)] = 0

    def set_epoch(self, epoch: int) -> None:
        """Have every example masked as this epoch has it."""
        self.epoch.fill_(epoch)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.set_epoch(int(state.epoch or 0))  # where a resumed run stands

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.set_epoch(int(self.epoch) + 1)  # counted: the epoch that a state tells of a stream is none

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        if "labels" in examples[0]:
            return default_data_collator(examples)
        pad = partial(pad_sequence, batch_first=True, padding_side=self.tokenizer.padding_side)
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        original = pad(rows, padding_value=self.tokenizer.pad_token_id)
        attention_mask = pad([torch.ones_like(row) for row in rows])
        chance, dice, words = pad([self._numbers(row) for row in rows]).unbind(-1)
        asked = self._draw(self.weights[original] * attention_mask, chance)

        labels = torch.where(asked, original, IGNORED)
        random_tokens = (words * len(self.weights)).long()
        input_ids = torch.where(asked & (dice < 0.8), self.mask_token_id, original)
        input_ids = torch.where(asked & (dice >= 0.9), random_tokens, input_ids)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _numbers(self, row: Tensor) -> Tensor:
        """(tokens, 3) random numbers from 0 to 1: those of one example in this epoch."""
        origin = np.array([self.seed, int(self.epoch)]).tobytes() + row.numpy().tobytes()
        digest = hashlib.blake2b(origin, digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.rand(len(row), 3, generator=generator, dtype=torch.float64)

    def _draw(self, weights: Tensor, chance: Tensor) -> Tensor:
        """(batch, tokens) weights to (batch, tokens) bool, True for the tokens that are drawn.

        Each waits for a time that is exponentially distributed, by its weight, and the first to come are drawn: one
        after the other, in proportion to the weights of those left.
        """
        ordinary = weights > 0
        count = (self.probability * ordinary.sum(1)).round().clamp(min=1)
        waits = torch.where(ordinary, -torch.log1p(-chance) / weights, torch.inf)
        return ordinary & (waits.argsort(1).argsort(1) < count[:, None])
