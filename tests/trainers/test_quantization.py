"""Quantization by a trainer: on labels alone, after pruning, with a teacher, and resumed to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, TrainerCallback, set_seed

from prunelle.compression import bake
from prunelle.compression.quantization import Quantization
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


def quantize(folder: Path, quantization: dict[str, Any], prune: bool = True, **more: Any) -> QATTrainer:
    arguments = FinetuningArguments(**settings(folder, **more))
    chosen = QuantizationArguments(**quantization)
    pruning = PruningArguments(density=[0.3], score="movement").methods(0) if prune else []
    quantized = model()
    quantized.bert.embeddings.LayerNorm.weight.data[3] *= 50  # a channel that is evened out where nothing is pruned
    trainer = QATTrainer(quantized, arguments, chosen, pruning, train_dataset=rows(), eval_dataset=rows(6))
    trainer.train(resume_from_checkpoint=more.get("resume_from_checkpoint"))
    return trainer


def state(trainer: CompressionTrainer) -> dict[str, torch.Tensor]:
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


RUNS = {
    "before rounding": (2, {"quantization_start": 0.5}),
    "while rounding": (6, {"scheme": "int8-static", "activation_ranges": "learned", "range_freeze": 0.6}),
}


@pytest.mark.parametrize(("step", "quantization"), RUNS.values(), ids=RUNS)
def test_a_run_with_pruning_resumes_to_the_bit(tmp_path: Path, step: int, quantization: dict[str, Any]) -> None:
    """Prevents rounding, calibration or learned scales from starting anew in a run that goes on from a checkpoint."""
    more = {"save_strategy": "steps", "save_steps": step, "per_device_train_batch_size": 4}
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


def test_channels_stay_evened_out_in_a_resumed_run(tmp_path: Path) -> None:
    """Prevents a run that goes on as if nothing were divided, and a file that divides nothing."""
    more = {"save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4, "prune": False}
    whole = quantize(tmp_path, {"scheme": "int8-static"}, **more)
    resumed = quantize(tmp_path, {"scheme": "int8-static"}, **more, resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
    for key, tensor in state(whole).items():
        assert torch.equal(tensor, state(resumed)[key]), key
    plans = [next(m for m in trainer.methods if isinstance(m, Quantization)).plan() for trainer in (whole, resumed)]
    assert plans[0].divisors
    assert plans[0] == plans[1]


def test_ranges_are_calibrated_first_and_frozen_last(tmp_path: Path) -> None:
    """Prevents a first step on ranges of nothing, and a range that moves after the last look at the data."""
    chosen = QuantizationArguments(scheme="int8-static", activation_ranges="learned", range_freeze=0.5)
    trainer = QATTrainer(
        model(), FinetuningArguments(**settings(tmp_path, learning_rate=0.1)), chosen, train_dataset=rows()
    )
    seen: list[torch.Tensor] = []
    quantizer = trainer.model.bert.encoder.layer[0].output.dense.input_quantizer

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(quantizer.scale.detach().clone())

    trainer.add_callback(Watch())
    trainer.train()
    assert len(seen) == 8
    assert 0 < seen[0] < 0.1
    assert not torch.equal(seen[0], seen[3])
    assert all(torch.equal(scale, seen[4]) for scale in [*seen[5:], quantizer.scale])
