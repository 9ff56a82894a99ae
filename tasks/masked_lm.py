"""Masked language modelling on text packed into full blocks."""

from itertools import islice
from typing import Any

from transformers import AutoModelForMaskedLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks.masking import FrequencySmoothedMasking, count_tokens
from prunelle.tasks.packing import PackedTexts

STREAMED_BLOCKS_COUNTED = 20_000


class MaskedLanguageModelling(PackedTexts):
    """Masked words are predicted from the words on either side. The seed draws the masks."""

    auto_model_class = AutoModelForMaskedLM

    def encode(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The splits as full blocks of `input_ids`; validation and test masked once and for all, with `labels`.

        With `--static_masking` so is the training split. RoBERTa (arXiv:1907.11692) compares the two.

        Raises:
            InputError: The tokenizer has no mask token, or the text does not fill one block.
        """
        if tokenizer.mask_token_id is None:
            raise InputError(f"the tokenizer {tokenizer.name_or_path} has no mask token; --task masked-lm needs one")
        blocks = self.pack(tokenizer)
        masking = self.collator(tokenizer, blocks)

        def mask(block: dict[str, list[int]]) -> dict[str, list[int]]:
            return {name: tensor[0].tolist() for name, tensor in masking([block]).items()}

        for split, packed in blocks.items():
            if split != "train" or self.arguments.static_masking:
                blocks[split] = packed.map(mask, desc=f"Masking {split}")
        return blocks

    def collator(self, tokenizer: Tokenizer, encoded: dict[str, Any]) -> FrequencySmoothedMasking:
        """Masks anew in every epoch; rare tokens by their frequency in the encoded training data."""
        counted = (row["input_ids"] for row in islice(encoded["train"], STREAMED_BLOCKS_COUNTED))
        return FrequencySmoothedMasking(
            tokenizer,
            count_tokens(counted, len(tokenizer)),
            self.arguments.mlm_probability,
            self.arguments.mask_frequency_exponent,
            self.seed,
        )
