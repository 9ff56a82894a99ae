"""Fine-tuning on labels: the same gradient however a batch is cut."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, set_seed

from prunelle.trainers import FinetuningArguments
from prunelle.trainers.compression import CompressionTrainer
from prunelle.trainers.finetuning import SETTINGS_THAT_TRAIN


def train(folder: Path, **arguments: Any) -> CompressionTrainer:
    set_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    words = torch.randint(5, 40, (16, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": w, "attention_mask": [1] * 6, "labels": n % 3} for n, w in enumerate(words)]
    settings = FinetuningArguments(
        output_dir=str(folder), optim="sgd", learning_rate=0.1, max_grad_norm=0.0, max_steps=3, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **arguments,
    )  # fmt: skip
    model = BertForSequenceClassification(config).double()
    trainer = CompressionTrainer(model, settings, train_dataset=Dataset.from_list(rows))
    trainer.train()
    return trainer


def test_accumulated_batches_train_like_one(tmp_path: Path) -> None:
    """Prevents a teacher whose loss is multiplied by the number of accumulated steps, as the classifier's own is."""
    whole = train(tmp_path / "1", per_device_train_batch_size=4)
    split = train(tmp_path / "2", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for one, four in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(four, one, rtol=0, atol=1e-10)
    assert split.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-4)


def test_labels_are_smoothed(tmp_path: Path) -> None:
    """Prevents a flag of the Trainer's, which a loss of our own takes the place of, from doing nothing."""
    trainer = train(tmp_path, label_smoothing_factor=1.0)
    rows = trainer.train_dataset.with_format("torch")[:]
    with torch.no_grad():
        chances = trainer.model.eval()(input_ids=rows["input_ids"]).logits.log_softmax(-1)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(-chances.mean().item(), rel=1e-5)


def test_a_teacher_is_identified_by_flags_that_exist() -> None:
    """Prevents a renamed flag from no longer telling two teachers apart."""
    assert set(SETTINGS_THAT_TRAIN) <= {field.name for field in dataclasses.fields(FinetuningArguments)}
