"""Masked language modelling on text packed into full blocks."""

from itertools import islice
from typing import Any

import datasets
import torch
from transformers import AutoModelForMaskedLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks.masking import FrequencySmoothedMasking, count_tokens
from prunelle.tasks.packing import PackedTexts

STREAMED_BLOCKS_COUNTED = 20_000


class MaskedLanguageModelling(PackedTexts):
    """Masked words are predicted from the words on either side. The seed draws the masks of the evaluation data."""

    auto_model_class = AutoModelForMaskedLM

    def encode(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The splits as full blocks of `input_ids`; validation and test masked once and for all, with `labels`.

        Raises:
            InputError: The tokenizer has no mask token, or the text does not fill one block.
        """
        if tokenizer.mask_token_id is None:
            raise InputError(f"the tokenizer {tokenizer.name_or_path} has no mask token; --task masked-lm needs one")
        blocks = self.pack(tokenizer)
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


def _row(batch: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: tensor[0].tolist() for name, tensor in batch.items()}
