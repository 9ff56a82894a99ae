"""Which tokens a masked language model is asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase

from prunelle.tasks import TASKS, DataArguments
from prunelle.tasks.masking import FrequencySmoothedMasking, count_tokens
from prunelle.tasks.tokenizer import train_tokenizer
from prunelle.trainers import CompressionTrainer, FinetuningArguments
from prunelle.trainers.finetuning import trainer_data


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a bird in the hand is worth two in the bush"] * 3, 300)


def words_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> torch.Tensor:
    return torch.randint(5, len(tokenizer), (rows, 128), generator=torch.Generator().manual_seed(1))


def examples_of(words: torch.Tensor) -> list[dict[str, list[int]]]:
    return [{"input_ids": row} for row in words.tolist()]


def test_rare_tokens_are_asked_for_in_proportion_to_their_smoothed_frequency(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Prevents an exponent that does nothing, or favours what is frequent."""
    counts = torch.ones(len(tokenizer))
    counts[10], counts[11] = 10_000, 100
    block = {"input_ids": [10, 11] * 500}
    # Among two tokens drawn one at a time the odds are (10,000 / 100) ** 0.7.
    collator = FrequencySmoothedMasking(tokenizer, counts, 1 / 1000, 0.7)
    asked = []
    for epoch in range(2000):
        collator.set_epoch(epoch)
        asked.append(collator([block])["labels"].max().item())
    rare = asked.count(11) / len(asked)
    assert rare == pytest.approx(1 / (1 + 100**-0.7), abs=0.01)


def test_share_masked_and_what_becomes_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prevents 80/10/10 shares that drift, labels beside the masks, and changes where nothing is asked."""
    words = words_of(tokenizer, 64)
    batch = FrequencySmoothedMasking(tokenizer, torch.ones(len(tokenizer)))(examples_of(words))
    asked = batch["labels"] != -100
    assert (asked.sum(1) == round(0.15 * 128)).all()
    assert torch.equal(batch["labels"][asked], words[asked])
    assert torch.equal(batch["input_ids"][~asked], words[~asked])
    masked = (batch["input_ids"] == tokenizer.mask_token_id) & asked
    assert masked.sum() / asked.sum() == pytest.approx(0.8, abs=0.03)
    kept = (batch["input_ids"] == words) & asked
    assert kept.sum() / asked.sum() == pytest.approx(0.1, abs=0.03)


def test_special_tokens_and_padding_are_never_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prevents a model that learns to predict padding; and an error on a batch without words."""
    collator = FrequencySmoothedMasking(tokenizer, torch.ones(len(tokenizer)), exponent=0.0)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    batch = collator([{"input_ids": [cls, 10, 11, 12, sep]}, {"input_ids": [cls, sep]}])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert (batch["labels"] != -100).sum() == 1
    assert (collator([{"input_ids": [cls, sep]}])["labels"] == -100).all()


def test_masks_do_not_depend_on_how_batches_are_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prevents an accumulated batch, or one dealt out to processes, from asking for other words than a whole one."""
    examples = examples_of(words_of(tokenizer, 8))
    examples[3]["input_ids"] = examples[3]["input_ids"][:40]
    collator = FrequencySmoothedMasking(tokenizer, torch.ones(len(tokenizer)))
    whole = collator(examples)
    torch.manual_seed(5)
    parts = [FrequencySmoothedMasking(tokenizer, torch.ones(len(tokenizer)))([example]) for example in examples]
    for name, rows in whole.items():
        for row, part in zip(rows, parts, strict=True):
            assert torch.equal(row[: part[name].shape[1]], part[name][0]), name


def test_each_example_has_masks_of_its_own_and_others_in_another_epoch(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prevents processes, or epochs, that ask for the same places again and again; and a seed that does nothing."""
    examples = examples_of(words_of(tokenizer, 8))
    collator = FrequencySmoothedMasking(tokenizer, torch.ones(len(tokenizer)))
    other_seed = FrequencySmoothedMasking(tokenizer, torch.ones(len(tokenizer)), seed=1)(examples)["labels"]
    first = collator(examples)["labels"]
    collator.set_epoch(1)
    second = collator(examples)["labels"]
    asked = [(labels != -100).float().flatten() for labels in (first, second, other_seed)]
    asked.append(asked[0].view(8, -1).roll(1, dims=0).flatten())
    overlap = torch.stack(asked).corrcoef() - torch.eye(4)
    assert overlap.abs().max() < 0.15


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_masks_every_epoch_anew_and_a_resumed_one_alike(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, workers: int
) -> None:
    """Prevents masks that are drawn once where the Trainer, or a worker that outlives an epoch, is told no epoch; and
    a resumed run that begins with the masks of the first epoch again."""
    (tmp_path / "text.txt").write_text("a bird in the hand is worth two in the bush\n" * 40)
    path = str(tmp_path / "text.txt")
    task = TASKS["masked-lm"](
        DataArguments(task="masked-lm", train_file=path, validation_file=path, max_seq_length=64), 0
    )
    encoded = task.encode(tokenizer)
    encoded["train"] = encoded["train"].take(4)

    def train(**flags: Any) -> list[list[list[int]]]:
        """The labels of each batch, in the order of the steps."""
        seen = []

        class Watched(CompressionTrainer):
            def training_step(self, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
                seen.append(sorted(inputs["labels"].tolist()))
                return super().training_step(model, inputs, *rest)

        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
        arguments = FinetuningArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=3,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
        )
        Watched(BertForMaskedLM(config), arguments, **trainer_data(task, tokenizer, encoded)).train(**flags)
        return seen

    whole = train()
    epochs = [sorted(whole[step] + whole[step + 1]) for step in (0, 2, 4)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")) == whole[3:]


def test_examples_that_are_masked_already_stay_so(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prevents models from being compared on different questions."""
    collator = FrequencySmoothedMasking(tokenizer, torch.ones(len(tokenizer)))
    example = {"input_ids": [2, 4, 11, 3], "attention_mask": [1] * 4, "labels": [-100, 10, -100, -100]}
    batch = collator([example, example])
    assert {name: rows[1].tolist() for name, rows in batch.items()} == example


def test_tokens_are_counted() -> None:
    """Prevents frequencies of something else than the training blocks."""
    assert count_tokens([[1, 1, 3], [3, 3, 0]], 5).tolist() == [1, 2, 0, 3, 0]
