"""The distillation trainer: the same gradient however a batch is cut, terms by name, resume to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedModel, set_seed

from prunelle.compression import student_from_layers
from prunelle.losses import HardLabelLoss, HiddenCosineLoss, SoftTargetLoss
from prunelle.trainers import DistillationArguments, DistillationTrainer

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    "initializer_range": 0.5,
}


def rows(count: int, masked_lm: bool) -> Dataset:
    """Random rows of uneven length, padded to 12; a masked LM's ask for an uneven number of tokens."""
    draw = torch.Generator().manual_seed(0)
    examples = []
    for number in range(count):
        length = int(torch.randint(3, 12, (1,), generator=draw))
        words = torch.randint(5, 40, (12,), generator=draw)
        mask = torch.arange(12) < length
        asked = mask & (torch.rand(12, generator=draw) < 0.1 + 0.2 * (number % 4))
        labels = torch.where(asked, words, -100).tolist() if masked_lm else number % 3
        examples.append(
            {"input_ids": (words * mask).tolist(), "attention_mask": mask.long().tolist(), "labels": labels}
        )
    return Dataset.from_list(examples)


def pair(masked_lm: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    set_seed(0)
    teacher = (BertForMaskedLM if masked_lm else BertForSequenceClassification)(BertConfig(**CONFIG))
    # In float64 what differs is the arithmetic, not its rounding.
    return student_from_layers(teacher, [0]).double(), teacher.double()


def train(folder: Path, masked_lm: bool, **arguments: Any) -> DistillationTrainer:
    student, teacher = pair(masked_lm)
    settings: dict[str, Any] = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = DistillationTrainer(
        student,
        teacher,
        DistillationArguments(output_dir=str(folder), **(settings | arguments)),
        train_dataset=rows(16, masked_lm),
        eval_dataset=rows(6, masked_lm),
    )
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer


@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("masked_lm", [True, False], ids=["masked-lm", "classification"])
def test_accumulated_batches_train_like_one(tmp_path: Path, masked_lm: bool, positions: str) -> None:
    """Prevents each micro-batch from being averaged for itself, which weighs rare tokens up to 4 times."""
    whole = train(tmp_path / "1", masked_lm, per_device_train_batch_size=4, distilled_positions=positions)
    split = train(
        tmp_path / "2",
        masked_lm,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        distilled_positions=positions,
    )
    for (name, one), four in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(four, one, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    for one_log, four_log in zip(whole.state.log_history[:-1], split.state.log_history[:-1], strict=True):
        assert {k: v for k, v in one_log.items() if "loss" in k} == pytest.approx(
            {k: v for k, v in four_log.items() if "loss" in k}, rel=1e-4
        )


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_the_first_step_is_the_published_objective(tmp_path: Path, positions: str) -> None:
    """Prevents weights, temperature or positions from being mixed up: 5, 2 and 1 at T = 2, by the losses alone."""
    trainer = train(
        tmp_path, True, max_steps=1, per_device_train_batch_size=16, learning_rate=0.0, distilled_positions=positions
    )
    student, teacher = pair(True)
    batch = {name: torch.tensor(column[:]) for name, column in rows(16, True).to_dict().items()}
    labels, mask = batch.pop("labels"), batch["attention_mask"].bool()
    with torch.no_grad():
        ours = student(**batch, output_hidden_states=True)
        theirs = teacher(**batch, output_hidden_states=True)
    asked = labels != -100
    chosen = asked if positions == "masked" else mask
    expected = {
        "loss_soft_target": SoftTargetLoss(2.0)(ours.logits[chosen], theirs.logits[chosen]).item(),
        "loss_hard_label": HardLabelLoss()(ours.logits[asked], labels[asked]).item(),
        "loss_hidden_cosine": HiddenCosineLoss()(ours.hidden_states[-1], theirs.hidden_states[-1], mask).item(),
    }
    logged = trainer.state.log_history[0]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert logged["loss"] == pytest.approx(
        5 * logged["loss_soft_target"] + 2 * logged["loss_hard_label"] + logged["loss_hidden_cosine"], rel=1e-4
    )


def test_evaluation_terms_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """Prevents a mean over batches from passing for a mean over tokens."""
    small = train(tmp_path / "1", True, per_device_eval_batch_size=1).evaluate()
    large = train(tmp_path / "2", True, per_device_eval_batch_size=6).evaluate()
    names = ["eval_loss", "eval_loss_soft_target", "eval_loss_hard_label", "eval_loss_hidden_cosine"]
    assert [small[name] for name in names] == pytest.approx([large[name] for name in names], rel=1e-5)


def test_the_teacher_learns_nothing_and_is_not_saved(tmp_path: Path) -> None:
    """Prevents a teacher that drifts towards its student, and checkpoints of twice the size."""
    _, before = pair(False)
    trainer = train(tmp_path, False, save_strategy="steps", save_steps=2)
    assert trainer.teacher is not None
    for one, other in zip(trainer.teacher.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is None
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert saved.config.num_hidden_layers == 1


def test_a_term_of_weight_0_is_not_computed(tmp_path: Path) -> None:
    """Prevents paying for a teacher that nobody listens to, and a logged term that was never part of the loss."""
    trainer = train(tmp_path, False, soft_target_weight=0.0, hidden_cosine_weight=0.0)
    assert trainer.teacher is None
    assert "loss_soft_target" not in trainer.state.log_history[0]


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    """Prevents a run that was cut off from ending elsewhere: optimizer, schedule, order of the data, dropout."""
    shared: dict[str, Any] = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "per_device_train_batch_size": 4}
    whole = train(tmp_path, False, save_strategy="steps", save_steps=2, **shared)
    resumed = train(tmp_path, False, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **shared)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
