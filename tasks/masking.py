"""Which tokens a masked language model has to predict."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import default_data_collator

IGNORED = -100


def count_tokens(blocks: Iterable[list[int]], vocabulary_size: int) -> Tensor:
    """How often each token occurs. Returns (vocabulary,), int64."""
    counts = torch.zeros(vocabulary_size, dtype=torch.int64)
    for block in blocks:
        counts += torch.bincount(torch.as_tensor(block), minlength=vocabulary_size)
    return counts


class FrequencySmoothedMasking:
    """Collator that chooses rare tokens more often than their share, and masks them.

    Among all ordinary tokens of a batch, `probability` are drawn without replacement with weights
    count^-exponent. Of those drawn 80 % become the mask token, 10 % a random token, 10 % stay (as in BERT).
    Examples that carry `labels` are masked already (evaluation data is, once and for all) and are only stacked.

    Args:
        tokenizer: Gives the mask token, the special tokens (never drawn) and the padding.
        counts: (vocabulary,) occurrences of each token in the training data.
        probability: Share of tokens to predict, between 0 and 1.
        exponent: 0 draws evenly; DistilBERT uses 0.7.
        generator: Where the randomness comes from; by default torch's own, which the Trainer seeds and resumes.

    Returns (of a call):
        `input_ids`, `attention_mask` and `labels`, each (batch, tokens), the labels -100 where nothing is asked.

    Reference:
        Sanh et al., DistilBERT, arXiv:1910.01108; the exponent is that of XLM, arXiv:1901.07291.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        counts: Tensor,
        probability: float = 0.15,
        exponent: float = 0.7,
        generator: torch.Generator | None = None,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no mask token; masked language modelling needs one")
        self.tokenizer = tokenizer
        self.mask_token_id: int = tokenizer.mask_token_id
        self.probability = probability
        self.generator = generator
        self.weights = counts.clamp(min=1).double() ** -exponent
        self.weights[torch.as_tensor(tokenizer.all_special_ids)] = 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        if "labels" in examples[0]:
            return default_data_collator(examples)
        batch = self.tokenizer.pad(
            {"input_ids": [e["input_ids"] for e in examples]}, return_tensors="pt", return_attention_mask=True
        )
        original = batch["input_ids"]
        weights = self.weights[original] * batch["attention_mask"]
        asked = self._draw(weights)

        labels = torch.where(asked, original, IGNORED)
        dice = torch.rand(original.shape, generator=self.generator)
        random_tokens = torch.randint(len(self.weights), original.shape, generator=self.generator)
        input_ids = torch.where(asked & (dice < 0.8), self.mask_token_id, original)
        input_ids = torch.where(asked & (dice >= 0.9), random_tokens, input_ids)
        return {"input_ids": input_ids, "attention_mask": batch["attention_mask"], "labels": labels}

    def _draw(self, weights: Tensor) -> Tensor:
        """(batch, tokens) weights to (batch, tokens) bool, True for the tokens that are drawn."""
        flat = weights.flatten()
        count = min(max(1, round(self.probability * int(flat.count_nonzero()))), int(flat.count_nonzero()))
        asked = torch.zeros_like(flat, dtype=torch.bool)
        if count:
            asked[torch.multinomial(flat, count, generator=self.generator)] = True
        return asked.view_as(weights)
