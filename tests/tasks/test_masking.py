"""Which tokens a masked language model is asked for."""

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from prunelle.tasks.masking import FrequencySmoothedMasking, count_tokens
from prunelle.tasks.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a bird in the hand is worth two in the bush"] * 3, 300)


def masking(tokenizer: PreTrainedTokenizerBase, counts: torch.Tensor, exponent: float) -> FrequencySmoothedMasking:
    return FrequencySmoothedMasking(tokenizer, counts, 0.15, exponent, torch.Generator().manual_seed(0))


def test_rare_tokens_are_asked_for_in_proportion_to_their_smoothed_frequency(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Prevents an exponent that does nothing, or favours what is frequent."""
    counts = torch.ones(len(tokenizer))
    counts[10], counts[11] = 10_000, 100
    block = {"input_ids": [10, 11] * 500}
    # Among two tokens drawn one at a time the odds are (10,000 / 100) ** 0.7.
    collator = FrequencySmoothedMasking(tokenizer, counts, 1 / 1000, 0.7, torch.Generator().manual_seed(0))
    asked = [collator([block])["labels"].max().item() for _ in range(2000)]
    rare = asked.count(11) / len(asked)
    assert rare == pytest.approx(1 / (1 + 100**-0.7), abs=0.01)


def test_share_masked_and_what_becomes_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prevents 80/10/10 shares that drift, labels beside the masks, and changes where nothing is asked."""
    words = torch.randint(5, len(tokenizer), (64, 128), generator=torch.Generator().manual_seed(1))
    examples = [{"input_ids": row} for row in words.tolist()]
    batch = masking(tokenizer, torch.ones(len(tokenizer)), 0.7)(examples)
    asked = batch["labels"] != -100
    assert asked.sum() == round(0.15 * words.numel())
    assert torch.equal(batch["labels"][asked], words[asked])
    assert torch.equal(batch["input_ids"][~asked], words[~asked])
    masked = (batch["input_ids"] == tokenizer.mask_token_id) & asked
    assert masked.sum() / asked.sum() == pytest.approx(0.8, abs=0.03)
    kept = (batch["input_ids"] == words) & asked
    assert kept.sum() / asked.sum() == pytest.approx(0.1, abs=0.03)


def test_special_tokens_and_padding_are_never_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prevents a model that learns to predict padding; and an error on a batch without words."""
    collator = masking(tokenizer, torch.ones(len(tokenizer)), 0.0)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    batch = collator([{"input_ids": [cls, 10, 11, 12, sep]}, {"input_ids": [cls, sep]}])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert (batch["labels"] != -100).sum() == 1
    assert (collator([{"input_ids": [cls, sep]}])["labels"] == -100).all()


def test_examples_that_are_masked_already_stay_so(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prevents models from being compared on different questions."""
    collator = masking(tokenizer, torch.ones(len(tokenizer)), 0.7)
    example = {"input_ids": [2, 4, 11, 3], "attention_mask": [1] * 4, "labels": [-100, 10, -100, -100]}
    batch = collator([example, example])
    assert {name: rows[1].tolist() for name, rows in batch.items()} == example


def test_tokens_are_counted() -> None:
    """Prevents frequencies of something else than the training blocks."""
    assert count_tokens([[1, 1, 3], [3, 3, 0]], 5).tolist() == [1, 2, 0, 3, 0]
