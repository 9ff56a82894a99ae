"""Quantization by a trainer: on labels alone, after pruning, with a teacher, and resumed to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, set_seed

from prunelle.compression import bake
from prunelle.trainers import (
    CompressionTrainer,
    DistillationArguments,
    DistillationTrainer,
    FinetuningArguments,
    PruningArguments,
    QATTrainer,
    QuantizationArguments,
)


def model(seed: int = 0) -> PreTrainedModel:
    set_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 24, "max_position_embeddings": 32, "num_labels": 3, "initializer_range": 0.3}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **more, **no_dropout))


def rows(count: int = 16) -> Dataset:
    words = torch.randint(5, 40, (count, 8), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(8, dtype=torch.long).tolist()
    return Dataset.from_list(
        [{"input_ids": row.tolist(), "attention_mask": ones, "labels": n % 3} for n, row in enumerate(words)]
    )


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 8,
        "learning_rate": 1e-3,
        "logging_steps": 8,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | more


def quantize(folder: Path, quantization: dict[str, Any], **more: Any) -> QATTrainer:
    arguments = FinetuningArguments(**settings(folder, **more))
    chosen = QuantizationArguments(**quantization)
    pruning = PruningArguments(density=[0.3], score="movement").methods(0)
    trainer = QATTrainer(model(), arguments, chosen, pruning, train_dataset=rows(), eval_dataset=rows(6))
    trainer.train(resume_from_checkpoint=more.get("resume_from_checkpoint"))
    return trainer


def state(trainer: CompressionTrainer) -> dict[str, torch.Tensor]:
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


@pytest.mark.parametrize("step", [2, 6], ids=["before rounding", "while rounding"])
def test_a_run_with_pruning_resumes_to_the_bit(tmp_path: Path, step: int) -> None:
    """Prevents rounding from starting anew, or early, in a run that goes on from a checkpoint."""
    more = {"save_strategy": "steps", "save_steps": step, "per_device_train_batch_size": 4}
    quantization = {"quantization_start": 0.5}
    whole = quantize(tmp_path, quantization, **more)
    resumed = quantize(tmp_path, quantization, **more, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for key, tensor in state(whole).items():
        assert torch.equal(tensor, state(resumed)[key]), key
    assert whole.state.log_history[-2]["density"] == pytest.approx(0.3, abs=2e-3)
    bake(whole.model)
    weight = whole.model.bert.encoder.layer[0].output.dense.weight
    assert weight.count_nonzero() <= round(0.3 * weight.numel())


def test_a_model_is_quantized_while_it_is_distilled(tmp_path: Path) -> None:
    """Prevents a simulation that gets no nearer to what it simulates: learning from itself as it was."""
    student, teacher = model(), model()
    trainer = DistillationTrainer(
        student,
        teacher,
        DistillationArguments(**settings(tmp_path, max_steps=30, learning_rate=3e-4, hard_label_weight=0.0)),
        [QuantizationArguments().method()],
        train_dataset=rows(),
        eval_dataset=rows(),
    )
    before = trainer.evaluate()["eval_loss"]
    assert before > 0
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
