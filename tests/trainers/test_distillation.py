"""The distillation trainer: the same gradient however a batch is cut, terms by name, resume to the bit."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

import prunelle
from prunelle.compression import student_from_layers
from prunelle.errors import InputError
from prunelle.losses import (
    HardLabelLoss,
    HiddenCosineLoss,
    HiddenMSELoss,
    RelationalDistanceLoss,
    SelfAttentionRelationLoss,
    SoftTargetLoss,
)
from prunelle.trainers import DistillationArguments, DistillationTrainer
from prunelle.trainers.own_tokens import OwnTokens

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


def float32_pair(masked_lm: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    """As they are trained outside tests."""
    student, teacher = pair(masked_lm)
    return student.float(), teacher.float()


def narrow_pair(masked_lm: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The student has 2 layers of half the teacher's width."""
    _, teacher = pair(masked_lm)
    set_seed(1)
    return type(teacher)(BertConfig(**CONFIG | {"num_hidden_layers": 2, "hidden_size": 8})).double(), teacher


def own_tokens_pair(masked_lm: bool) -> tuple[PreTrainedModel, OwnTokens]:
    """The teacher reads tokens of its own."""
    student, teacher = pair(masked_lm)
    return student, OwnTokens(teacher, "teacher_1_")


def with_own_tokens(data: Dataset) -> Dataset:
    """Each text in the teacher's tokens too: here the student's backwards."""
    backwards = [[*ids[::-1]] for ids in data["input_ids"]], [[*mask[::-1]] for mask in data["attention_mask"]]
    own = Dataset.from_dict(dict(zip(("teacher_1_input_ids", "teacher_1_attention_mask"), backwards, strict=True)))
    return concatenate_datasets([data, own], axis=1)


def distilbert_pair(masked_lm: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The student is of another architecture."""
    _, teacher = pair(masked_lm)
    set_seed(1)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "initializer_range": 0.5, "num_labels": 3}
    config = DistilBertConfig(vocab_size=40, **sizes, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    return DistilBertForSequenceClassification(config).double(), teacher


def train(folder: Path, masked_lm: bool, models: Any = pair, **arguments: Any) -> DistillationTrainer:
    student, teacher = models(masked_lm)
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
    data = arguments.pop("train_dataset", None) or rows(16, masked_lm)
    trainer = DistillationTrainer(
        student,
        teacher,
        DistillationArguments(output_dir=str(folder), **(settings | arguments)),
        train_dataset=data,
        eval_dataset=rows(6, masked_lm),
    )
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer


@pytest.mark.parametrize(
    ("models", "batch", "rate", "tolerance"),
    [(pair, 1, 0.1, 1e-10), (float32_pair, 2, 0.02, 1e-6)],  # at 0.1 the loss grows, and with it what is rounded
    ids=["four of 1 in float64", "two of 2 in float32"],
)
@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("masked_lm", [True, False], ids=["masked-lm", "classification"])
def test_accumulated_batches_train_like_one(
    tmp_path: Path, masked_lm: bool, positions: str, models: Any, batch: int, rate: float, tolerance: float
) -> None:
    """Prevents each micro-batch from being averaged for itself, which weighs rare tokens up to 4 times."""
    flags: dict[str, Any] = {"distilled_positions": positions, "learning_rate": rate}
    whole = train(tmp_path / "1", masked_lm, models, **flags, per_device_train_batch_size=4)
    cut: dict[str, Any] = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
    split = train(tmp_path / "2", masked_lm, models, **flags, **cut)
    for (name, one), four in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(four, one, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
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


def half_unlabeled(count: int) -> Dataset:
    """Every other example has no label; of four in a row, the last two."""
    labels = [label if number % 4 < 2 else -100 for number, label in enumerate(rows(count, False)["labels"])]
    return rows(count, False).remove_columns("labels").add_column("labels", labels)


def test_unlabeled_examples_hear_the_teacher_alone(tmp_path: Path) -> None:
    """Prevents unlabeled examples that nobody learns from, and labels divided by examples that have none.

    With one example a batch, half of the batches hold no label: their cross-entropy is 0, not NaN.
    """
    flags: dict[str, Any] = {"train_dataset": half_unlabeled(16), "hidden_mse_weight": 1.0, "layer_map": "2:0"}
    whole = train(tmp_path / "1", False, per_device_train_batch_size=4, **flags)
    split = train(tmp_path / "2", False, per_device_train_batch_size=1, gradient_accumulation_steps=4, **flags)
    for one, four in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(four, one, rtol=0, atol=1e-10)

    first = train(tmp_path / "3", False, max_steps=1, per_device_train_batch_size=16, learning_rate=0.0, **flags)
    student, teacher = pair(False)
    batch = {name: torch.tensor(column[:]) for name, column in half_unlabeled(16).to_dict().items()}
    labels, mask = batch.pop("labels"), batch["attention_mask"]
    with torch.no_grad():
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    expected = {
        "loss_soft_target": SoftTargetLoss(2.0)(ours.logits, theirs.logits).item(),
        "loss_hard_label": HardLabelLoss()(ours.logits[labels >= 0], labels[labels >= 0]).item(),
        "loss_hidden_mse": HiddenMSELoss()(ours.hidden_states[1], theirs.hidden_states[3], mask).item(),
    }
    logged = first.state.log_history[0]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_any_label_teaches_no_nonsense(tmp_path: Path) -> None:
    """Prevents 0 / 0 where one whole step met no label."""
    alone = half_unlabeled(16).filter(lambda row: row["labels"] == -100)
    trainer = train(tmp_path, False, max_steps=2, per_device_train_batch_size=4, train_dataset=alone)
    assert trainer.state.log_history[0]["loss_hard_label"] == 0
    assert trainer.state.log_history[1]["loss_soft_target"] > 0
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_teacher_computes_in_its_own_dtype(tmp_path: Path, dtype: str) -> None:
    """Prevents a flag that does nothing, and a teacher whose weights are rounded before it is measured."""
    once: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 16, "learning_rate": 0.0}
    once["relation_weight"] = 1.0  # listens to queries, keys and values of the copy
    student, teacher = pair(True)
    trainer = train(tmp_path, True, lambda masked_lm: (student, teacher), **once, teacher_dtype=dtype)
    batch = {name: torch.tensor(column[:]) for name, column in rows(16, True).to_dict().items()}
    labels = batch.pop("labels")
    assert next(teacher.parameters()).dtype == torch.float64
    with torch.no_grad():
        ours, exact = student(**batch).logits, teacher(**batch).logits
        theirs = teacher.to(getattr(torch, dtype))(**batch).logits
    assert theirs.dtype == getattr(torch, dtype)
    assert not torch.equal(theirs.double(), exact)
    expected = SoftTargetLoss()(ours[labels != -100], theirs[labels != -100]).item()
    assert trainer.state.log_history[0]["loss_soft_target"] == pytest.approx(expected, rel=1e-5)


def test_a_term_of_weight_0_is_not_computed(tmp_path: Path) -> None:
    """Prevents paying for a teacher that nobody listens to, and a logged term that was never part of the loss."""
    trainer = train(tmp_path, False, soft_target_weight=0.0, hidden_cosine_weight=0.0)
    assert trainer.teacher is None
    assert "loss_soft_target" not in trainer.state.log_history[0]


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    """Prevents a run that was cut off from ending elsewhere: optimizer, schedule, order of the data, dropout."""
    shared: dict[str, Any] = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "per_device_train_batch_size": 4}
    shared["schedules"] = ["temperature:5:linear", "soft_target_weight:0:cosine:0.9"]
    whole = train(tmp_path, False, save_strategy="steps", save_steps=2, **shared)
    resumed = train(tmp_path, False, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **shared)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("masked_lm", [True, False], ids=["masked-lm", "classification"])
def test_weights_and_temperature_follow_their_schedules(tmp_path: Path, masked_lm: bool) -> None:
    """Prevents a schedule that is read and not followed, and a term that begins at 0 and never wakes."""
    moving = ["temperature:1:linear", "hidden_cosine_weight:3:linear:0.5", "hard_label_weight:0:cosine:0.5"]
    once: dict[str, Any] = {"per_device_train_batch_size": 16, "learning_rate": 0.0, "hidden_cosine_weight": 0.0}
    trainer = train(tmp_path, masked_lm, **once, temperature=5.0, schedules=moving)
    student, teacher = pair(masked_lm)
    batch = {name: torch.tensor(column[:]) for name, column in rows(16, masked_lm).to_dict().items()}
    chosen = batch.pop("labels") != -100
    with torch.no_grad():
        ours, theirs = (model(**batch).logits[chosen] for model in (student, teacher))
    for step, (temperature, cosine, hard) in enumerate([(5, 0, 2), (4, 1.5, 1), (3, 3, 0), (2, 3, 0)]):
        logged = trainer.state.log_history[step]
        assert logged["temperature"] == pytest.approx(temperature)
        assert logged["hidden_cosine_weight"] == pytest.approx(cosine)
        assert logged["hard_label_weight"] == pytest.approx(hard, abs=1e-12)
        soft = SoftTargetLoss(temperature)(ours, theirs).item()
        assert logged["loss_soft_target"] == pytest.approx(soft, rel=1e-5)
        total = 5 * soft + hard * logged["loss_hard_label"] + cosine * logged["loss_hidden_cosine"]
        assert logged["loss"] == pytest.approx(total, rel=1e-5)


NO_LOGITS = {"soft_target_weight": 0.0, "hard_label_weight": 0.0, "hidden_cosine_weight": 0.0}
ONE_TERM: dict[str, dict[str, Any]] = {
    **{
        f"soft_target {loss}": {"soft_target_weight": 1.0, "soft_target_loss": loss, "soft_target_top_k": 2}
        for loss in ("forward_kl", "reverse_kl", "jensen_shannon", "mse", "decoupled", "top_k")
    },
    "hidden_cosine": {"hidden_cosine_weight": 1.0, "hidden_projection": "identity"},
    "hidden_mse": {"hidden_mse_weight": 1.0, "hidden_projection": "random", "layer_map": "0:0,2:1"},
    "embedding": {"embedding_weight": 1.0, "hidden_projection": "identity"},
    "patient": {"patient_weight": 1.0, "hidden_projection": "identity", "layer_map": "last"},
    "attention": {"attention_weight": 1.0},
    "relation": {"relation_weight": 1.0, "relation_heads": 4, "relation_layer_map": "1:1"},
    "relation as in MiniLM": {"relation_weight": 1.0, "relations": "attention,value"},
    "relational_distance": {"relational_distance_weight": 1.0},
    "relational_angle": {"relational_angle_weight": 1.0},
}
ALL_TERMS: dict[str, Any] = {
    "soft_target_loss": "decoupled",
    "hidden_mse_weight": 1.0,
    "embedding_weight": 1.0,
    "patient_weight": 1.0,
    "hidden_projection": "identity",
    "attention_weight": 0.1,
    "relation_weight": 1.0,
    "relation_heads": 4,
    "learning_rate": 0.02,
}


@pytest.mark.parametrize("models", [narrow_pair, distilbert_pair])
@pytest.mark.parametrize("flags", ONE_TERM.values(), ids=ONE_TERM)
def test_each_term_alone_teaches_the_student(tmp_path: Path, models: Any, flags: dict[str, Any]) -> None:
    """Prevents a term that is logged and teaches nothing, or that only its projections learn from."""
    (name,) = {key.removesuffix("_weight") for key in flags if key.endswith("_weight")}
    shared: dict[str, Any] = {"max_steps": 12, "per_device_train_batch_size": 16, "optim": "adamw_torch"}
    trainer = train(tmp_path, False, models, **shared, **{**NO_LOGITS, "learning_rate": 3e-3, **flags})
    values = [line[f"loss_{name}"] for line in trainer.state.log_history[:-1]]
    assert values[-1] < values[0]
    before, _ = models(False)
    embeddings = [model.get_input_embeddings().weight for model in (trainer.model, before)]
    assert not torch.equal(*embeddings)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize("masked_lm", [True, False], ids=["masked-lm", "classification"])
def test_accumulated_batches_train_like_one_with_all_terms(tmp_path: Path, masked_lm: bool) -> None:
    """Prevents a term that counts its items otherwise than it sums them, and projections that average micro-batches."""
    whole = train(tmp_path / "1", masked_lm, narrow_pair, **ALL_TERMS, per_device_train_batch_size=4)
    cut: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    split = train(tmp_path / "2", masked_lm, narrow_pair, **ALL_TERMS, **cut)
    assert len(whole.projections) == 6
    for one, four in zip(
        [*whole.model.parameters(), *whole.projections],
        [*split.model.parameters(), *split.projections],
        strict=True,
    ):
        torch.testing.assert_close(four, one, rtol=0, atol=1e-10)
    for one_log, four_log in zip(whole.state.log_history[:-1], split.state.log_history[:-1], strict=True):
        logged = {k: v for k, v in one_log.items() if "loss" in k}
        assert len(logged) == 9
        assert logged == pytest.approx({k: v for k, v in four_log.items() if "loss" in k}, rel=1e-4)


def test_the_first_step_of_the_other_terms(tmp_path: Path) -> None:
    """Prevents layers off by one, queries for keys, or a sum over pairs where the mean is meant."""
    flags = {"hidden_mse_weight": 3.0, "relation_weight": 0.5, "relational_distance_weight": 2.0}
    maps = {"layer_map": "1:0", "relation_layer_map": "2:0", "relation_heads": 4, "relations": "query,value"}
    once: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 16, "learning_rate": 0.0}
    trainer = train(tmp_path, False, **once, **NO_LOGITS, **flags, **maps)
    student, teacher = pair(False)
    batch = {name: torch.tensor(column[:]) for name, column in rows(16, False).to_dict().items()}
    batch.pop("labels")
    mask = batch["attention_mask"]
    with torch.no_grad():
        ours, theirs = (model(**batch, output_hidden_states=True).hidden_states for model in (student, teacher))
        attention = [student.bert.encoder.layer[0].attention.self, teacher.bert.encoder.layer[2].attention.self]
        relations = []
        for name in ("query", "value"):
            s, t = (getattr(a, name)(h) for a, h in zip(attention, (ours[0], theirs[2]), strict=True))
            relations.append(SelfAttentionRelationLoss(4)(s, s, t, t, mask).item())
    means = [(h[-1] * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True) for h in (ours, theirs)]
    expected = {
        "loss_hidden_mse": HiddenMSELoss()(ours[1], theirs[2], mask).item(),
        "loss_relation": sum(relations) / 2,
        "loss_relational_distance": RelationalDistanceLoss()(*means).item(),
    }
    logged = trainer.state.log_history[0]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert logged["loss"] == pytest.approx(
        3 * logged["loss_hidden_mse"] + 0.5 * logged["loss_relation"] + 2 * logged["loss_relational_distance"], rel=1e-4
    )


def test_projections_resume_to_the_bit_and_stay_out_of_the_student(tmp_path: Path) -> None:
    """Prevents projections that start anew, gradients left over from the step before, and a student of other keys."""
    shared: dict[str, Any] = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "per_device_train_batch_size": 4}
    shared |= ALL_TERMS | {"hidden_projection": "random", "max_grad_norm": 1.0}
    whole = train(tmp_path, False, narrow_pair, save_strategy="steps", save_steps=2, **shared)
    checkpoint = tmp_path / "checkpoint-2"
    resumed = train(tmp_path, False, narrow_pair, resume_from_checkpoint=str(checkpoint), **shared)
    assert len(whole.projections) == 6
    for one, other in zip(
        [*whole.model.parameters(), *whole.projections],
        [*resumed.model.parameters(), *resumed.projections],
        strict=True,
    ):
        assert torch.equal(one, other)
    before = load_file(checkpoint / "projections.safetensors")
    assert not any(torch.equal(before[name], now) for name, now in whole.objective.state_dict().items())

    whole.save_model(str(tmp_path / "student"))
    assert not list((tmp_path / "student").glob("projections*"))
    assert load_file(tmp_path / "student" / "model.safetensors").keys() == whole.model.state_dict().keys()
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "student")
    for one, other in zip(saved.double().parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_without_projections_is_refused(tmp_path: Path) -> None:
    """Prevents projections from starting anew in the middle of a run, in silence."""
    train(tmp_path, False, save_strategy="steps", save_steps=2, per_device_train_batch_size=4)
    with pytest.raises(InputError, match="without --hidden_projection"):
        train(tmp_path, False, hidden_projection="identity", resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_checkpointed_activations_give_the_same_gradient(tmp_path: Path) -> None:
    """Prevents queries, keys and values that are caught without the graph behind them."""
    flags = {**NO_LOGITS, "relation_weight": 1.0, "attention_weight": 1.0, "learning_rate": 0.01}
    plain = train(tmp_path / "1", False, narrow_pair, **flags)
    checkpointed = train(tmp_path / "2", False, narrow_pair, activation_checkpointing=True, **flags)
    for one, other in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


aten = torch.ops.aten
# What a GPU's host waits for: a number, or the shape of what comes next.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.equal}
OURS = str(Path(prunelle.__file__).parent)


class NoWaiting(TorchDispatchMode):
    """Fails where this project's code asks the device for a number. What models do inside is theirs."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if function.overloadpacket in WAITS or by_mask:
            files = [frame.filename for frame in traceback.extract_stack()[:-1]]
            caller = next(file for file in reversed(files) if "/torch/" not in file)
            assert not caller.startswith(OURS), f"{function} in {caller}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("masked_lm", [True, False], ids=["masked-lm", "classification"])
def test_a_step_waits_for_nothing(tmp_path: Path, masked_lm: bool, positions: str) -> None:
    """Prevents a GPU that stands still in every step while the host asks it for a number."""
    flags = ALL_TERMS | {"soft_target_loss": "forward_kl", "relational_angle_weight": 1.0, "max_steps": 1}
    trainer = train(tmp_path, masked_lm, narrow_pair, **flags, distilled_positions=positions)
    batch = next(iter(trainer.get_train_dataloader()))
    with NoWaiting():
        _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        trainer.training_step(trainer.model, batch, items)
    del batch["distilled_positions"]  # which the collator found out, before the batch went to the device
    with NoWaiting(), pytest.raises(AssertionError, match=r"aten.nonzero.default in .*terms.py"):
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)


def test_the_trainer_waits_for_nothing_between_logs(tmp_path: Path) -> None:
    """Prevents the Trainer from asking in every micro-batch whether the loss is a number, as it does by default."""
    waits: list[str] = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket is aten._local_scalar_dense:
                files = [frame.filename for frame in traceback.extract_stack()[:-1]]
                waits.append(next(file for file in reversed(files) if "/torch/" not in file))
            return function(*args, **(kwargs or {}))

    with Waits():
        train(tmp_path, False, max_steps=6, logging_steps=100)
    assert len([caller for caller in waits if caller.endswith("transformers/trainer.py")]) == 1  # the mean of all steps


@pytest.mark.parametrize("masked_lm", [True, False], ids=["masked-lm", "classification"])
@pytest.mark.parametrize("inside", [0.0, 1.0])
def test_the_teacher_runs_under_inference_mode(tmp_path: Path, masked_lm: bool, inside: float) -> None:
    """Prevents bookkeeping for gradients that nobody takes; what is compared inside has to do with no_grad."""
    modes: list[tuple[bool, bool]] = []

    def listened(masked_lm: bool) -> Any:
        student, teacher = pair(masked_lm)
        teacher.register_forward_pre_hook(
            lambda *_: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        )
        return student, teacher

    train(tmp_path, masked_lm, listened, max_steps=1, hidden_cosine_weight=inside)
    assert modes[-1] == (not inside, False)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from test_distillation import BY_TWO, CASES, train

for name, (masked_lm, models, flags) in CASES.items():
    folder = Path(sys.argv[1]) / name
    trainer = train(folder, masked_lm, models, **BY_TWO | flags)
    assert trainer.accelerator.num_processes == 2
    learned = [*trainer.accelerator.unwrap_model(trainer.model).parameters(), *trainer.projections]
    tensors = {str(number): parameter.detach().clone() for number, parameter in enumerate(learned)}
    save_file(tensors, f"{folder}-{trainer.args.process_index}")
    Path(f"{folder}-{trainer.args.process_index}.json").write_text(json.dumps(trainer.state.log_history))
"""
WITHOUT_LOGITS: dict[str, Any] = {**NO_LOGITS, "learning_rate": 0.02}
ONLY_LOGITS: dict[str, Any] = {"hidden_cosine_weight": 0.0}
BY_TWO: dict[str, Any] = {"per_device_train_batch_size": 2}
CASES: dict[str, tuple[bool, Any, dict[str, Any]]] = {
    "triple loss": (True, pair, {}),
    "triple loss, all positions": (True, pair, {"distilled_positions": "all", "learning_rate": 0.02}),
    "triple loss, accumulated": (True, pair, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "classes": (False, pair, {}),
    "own tokens": (False, own_tokens_pair, {"train_dataset": with_own_tokens(rows(16, False)), **ONLY_LOGITS}),
    "projected": (
        False,
        narrow_pair,
        {**WITHOUT_LOGITS, "hidden_mse_weight": 1.0, "hidden_projection": "random", "max_grad_norm": 1.0},
    ),
    "caught": (False, narrow_pair, {**WITHOUT_LOGITS, "relation_weight": 1.0}),
}


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """Prevents a process that averages over its own tokens, projections that differ, and DDP waiting for a head.

    The processes' batches ask for uneven numbers of tokens. Without a term on logits no loss reads the head.
    """
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    (tmp_path / "two").mkdir()
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, tmp_path / "two.py", tmp_path / "two"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    alone: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    for name, (masked_lm, models, flags) in CASES.items():
        one = train(tmp_path / "one", masked_lm, models, **flags | alone)
        expected = [*one.model.parameters(), *one.projections]
        for process in range(2):
            found = load_file(tmp_path / "two" / f"{name}-{process}")
            for number, parameter in enumerate(expected):
                torch.testing.assert_close(found[f"{number}"], parameter.detach(), rtol=0, atol=1e-10)
        curve = json.loads((tmp_path / "two" / f"{name}-0.json").read_text())
        for ours, theirs in zip(curve[:-1], one.state.log_history[:-1], strict=True):
            losses = {key: value for key, value in theirs.items() if key.startswith("loss")}
            assert {key: ours[key] for key in losses} == pytest.approx(losses, rel=1e-5), name
