"""What is computed in half precision, and what is not: weights that are trained, and models after training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, set_seed

from prunelle.compression import student_from_layers
from prunelle.trainers import DistillationArguments, DistillationTrainer, FinetuningArguments
from prunelle.trainers.compression import CompressionTrainer

CONFIG = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "max_steps": 2, "learning_rate": 1e-6, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "dataloader_pin_memory": False, "use_cpu": True,
}  # fmt: skip


def rows() -> Dataset:
    words = torch.randint(5, 40, (16, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": each, "attention_mask": [1] * 6, "labels": each} for each in words])


def teacher() -> BertForMaskedLM:
    set_seed(0)
    return BertForMaskedLM(CONFIG)


def distil(folder: Path, listened: nn.Module, **arguments: Any) -> DistillationTrainer:
    student = student_from_layers(listened, [0])
    settings = DistillationArguments(output_dir=str(folder), **SETTINGS, **arguments)
    trainer = DistillationTrainer(student, listened, settings, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    return trainer


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_checkpoint_of_half_precision_is_trained_in_full(tmp_path: Path, stored: torch.dtype) -> None:
    """Prevents weights of 8 bits that most steps leave where they are, and a student that has not learned."""
    halved = teacher().to(stored)
    trainer = distil(tmp_path, halved)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in halved.parameters()} == {stored}
    before = student_from_layers(halved, [0]).float()
    pairs = zip(trainer.model.parameters(), before.parameters(), strict=True)
    assert torch.stack([(new != old).float().mean() for new, old in pairs]).median() == 1

    tuned = CompressionTrainer(
        teacher().to(stored), FinetuningArguments(output_dir=str(tmp_path), **SETTINGS), train_dataset=rows()
    )
    assert {parameter.dtype for parameter in tuned.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("asked", "computed"),
    [(None, torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_the_teacher_computes_in_what_is_asked_of_it(tmp_path: Path, asked: str | None, computed: torch.dtype) -> None:
    """Prevents --teacher_dtype from being overridden by the precision that the student trains in."""
    seen: list[torch.dtype] = []
    speaking = teacher()
    speaking.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    distil(tmp_path, speaking, bf16=True, teacher_dtype=asked)
    assert seen[-1] == computed


def test_what_was_trained_in_half_precision_computes_in_full(tmp_path: Path) -> None:
    """Prevents an export, and figures, of a model that rounds what the deployed one does not."""
    speaking = teacher()
    trainer = distil(tmp_path, speaking, bf16=True)

    def difference(model: nn.Module) -> Tensor:
        copy = type(model)(model.config)  # a model that nobody has prepared for anything
        copy.load_state_dict(model.state_dict())
        inputs = {"input_ids": torch.arange(5, 11)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
        with torch.no_grad():
            return (model.eval()(**inputs).logits - copy.eval()(**inputs).logits).abs().max()

    assert difference(trainer.model) > 1e-3
    assert difference(trainer.unwrapped_model()) == 0
    assert difference(speaking) == 0
