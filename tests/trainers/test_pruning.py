"""Pruning by a trainer: alone, with a teacher, accumulated, on two processes, and resumed to the bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedModel, set_seed

from prunelle.compression import bake
from prunelle.compression.anatomy import dissect
from prunelle.compression.pruning import LearnedMask, density_by_weight
from prunelle.errors import InputError
from prunelle.trainers import (
    CompressionTrainer,
    DistillationArguments,
    DistillationTrainer,
    FinetuningArguments,
    PruningArguments,
    PruningTrainer,
)

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "num_labels": 3,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
OTHER_NAMES = {"vocab_size": 40, "num_labels": 3, "initializer_range": 0.3}
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "DistilBert": {**OTHER_NAMES, "dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 2},
    "ModernBert": {**SIZES, **SPECIAL},
    "GPT2": {**OTHER_NAMES, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "pad_token_id": 1},
}


def model(name: str = "Bert", seed: int = 0) -> PreTrainedModel:
    set_seed(seed)
    model_class = getattr(transformers, f"{name}ForSequenceClassification")
    return model_class(model_class.config_class(**CONFIGS[name]))


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
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | more


def prune(folder: Path, pruning: dict[str, Any], student: PreTrainedModel | None = None, **more: Any) -> PruningTrainer:
    arguments = FinetuningArguments(**settings(folder, **more))
    pruning = {**pruning, "density": [pruning["density"]]}
    trainer = PruningTrainer(
        student or model(), arguments, PruningArguments(**pruning), train_dataset=rows(), eval_dataset=rows(6)
    )
    trainer.train(resume_from_checkpoint=more.get("resume_from_checkpoint"))
    return trainer


def state(trainer: CompressionTrainer) -> dict[str, torch.Tensor]:
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


@pytest.mark.parametrize(
    ("name", "score"),
    [
        *((name, score) for name in CONFIGS for score in ("magnitude", "soft_movement")),
        *(("Roberta", "taylor"), ("DistilBert", "wanda"), ("ModernBert", "l0")),
        *(("GPT2", score) for score in ("taylor", "wanda", "l0")),
    ],
)
def test_a_model_is_pruned_while_it_is_distilled(tmp_path: Path, name: str, score: Any) -> None:
    """Prevents a method that only works on labels, or an architecture in which masks and hooks disturb each other."""
    terms = {"hidden_mse_weight": 1.0, "relation_weight": 1.0}
    pruning = PruningArguments(density=[0.3], score=score)
    trainer = DistillationTrainer(
        model(name),
        model(name, seed=1),
        DistillationArguments(**settings(tmp_path, **terms)),
        pruning.methods(seed=0),
        train_dataset=rows(),
        eval_dataset=rows(6),
    )
    trainer.train()
    lines = trainer.state.log_history[:-1]
    assert [line["density"] for line in lines] == sorted((line["density"] for line in lines), reverse=True)
    assert lines[-1]["density"] == pytest.approx(0.3, abs=2e-2 if score == "wanda" else 2e-3)  # which rounds by the row
    assert lines[-1]["loss_soft_target"] > 0
    before = trainer.evaluate()["eval_loss"]
    assert bake(trainer.model)
    assert trainer.evaluate()["eval_loss"] == before


@pytest.mark.parametrize("structure", [["weights"], ["heads", "ffn"]], ids=" ".join)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_joint_run_shrinks_to_what_it_has_learned(tmp_path: Path, name: str, structure: list[str]) -> None:
    """Prevents masks that keep a teacher from being heard, another density than asked for, or a lossy shrinking."""

    def run(**terms: float) -> tuple[PreTrainedModel, float]:
        """The model, baked, and how far its predictions are from the teacher's."""
        more = {"max_steps": 16, "learning_rate": 3e-3, "hidden_cosine_weight": 0.0, **terms}
        student, teacher = model(name), model(name, seed=1).eval()
        trainer = DistillationTrainer(
            student,
            teacher,
            DistillationArguments(**settings(tmp_path, **more)),
            pruning.methods(seed=0),
            train_dataset=rows(),
        )
        trainer.train()
        names = bake(student)
        density = density_by_weight(student, names)
        for layer in dissect(student) if "heads" in structure else []:
            for units in (layer.heads, layer.ffn):
                assert density[f"{units.consumer[0]}.weight"] == 0.5
        if structure == ["weights"]:
            assert len(density) >= 8
            assert all(abs(share - 0.5) < 0.01 for share in density.values())
        with torch.no_grad():
            ours, theirs = (each.eval()(words).logits.log_softmax(-1) for each in (student, teacher))
        return student, float((theirs.exp() * (theirs - ours)).sum())

    pruning = PruningArguments(density=[0.5], structure=structure, shrink=True, round_to=4)
    words = torch.tensor(rows()["input_ids"])
    student, distance = run(soft_target_weight=1.0, hard_label_weight=0.0)
    _, distance_unheard = run(soft_target_weight=0.0, hard_label_weight=1.0)
    assert distance < 0.75 * distance_unheard
    small = pruning.compact(student)
    if "heads" in structure:
        assert [(layer.heads.count, layer.ffn.count) for layer in dissect(small)] == [(1, 12)] * 2
        assert small.num_parameters() < student.num_parameters()
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(words).logits, student(words).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "pruning",
    [
        {"score": "movement", "score_init": "noise"},
        {"score": "random"},
        {"score": "taylor"},
        {"score": "l0"},
        {"score": "wanda"},
        {"score": "magnitude", "schedule": "iterative", "pruning_rounds": 2, "rewind": "weights", "rewind_to": 0.25},
        {"score": "magnitude", "layer_norm_to_no_norm": True},
        {"score": "movement", "structure": ["ffn", "4x4"], "density": 0.5},
        {"score": "random", "structure": ["heads"], "density": 0.5},
        {"score": "movement", "structure": ["heads"], "density": 0.25},  # none is left in one of the layers
    ],
    ids=lambda pruning: " ".join([pruning["score"], *pruning.get("structure", [])]),
)
@pytest.mark.parametrize("step", [4, 7], ids=["while density falls", "with frozen masks"])
def test_a_run_resumes_to_the_bit(tmp_path: Path, pruning: dict[str, Any], step: int) -> None:
    """Prevents masks, scores, their optimizer state or the schedule from starting anew in the middle of a run."""
    pruning = {"density": 0.3, "ranking": "global"} | pruning
    more = {"save_strategy": "steps", "save_steps": step, "per_device_train_batch_size": 4, "weight_decay": 5.0}
    whole = prune(tmp_path, pruning, **more)
    resumed = prune(tmp_path, pruning, **more, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert any("mask" in key for key in state(whole))
    for key, tensor in state(whole).items():
        assert torch.equal(tensor, state(resumed)[key]), key


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    """Prevents masks and scores from starting anew in the middle of a run, in silence."""
    arguments = FinetuningArguments(**settings(tmp_path, save_strategy="steps", save_steps=4))
    CompressionTrainer(model(), arguments, train_dataset=rows()).train()
    with pytest.raises(InputError, match="was trained without compression"):
        prune(tmp_path, {"density": 0.3}, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"density": 0.4},
            r"whose schedule is \S*density=0\.3\D.* there and \S*density=0\.4\D.* here: resume with the sam",
        ),
        ({"pruning_cooldown": 0.4}, r"whose schedule is .*=0\.3\) there and .*=0\.4\) here"),
        ({"score": "l0"}, r"whose score is magnitude there and l0 here"),
        ({"structure": ["4x4"]}, r"whose structure is weights there and 4x4 here"),
        ({"excluded_modules": ["*.query"]}, r"whose modules are others"),
        (
            {"score": "random", "structure": ["layers"], "pruned_layers": [0]},
            r"whose structure is weights there and lay",
        ),
    ],
    ids=lambda change: " ".join(change) if isinstance(change, dict) else "",
)
def test_a_run_resumes_with_the_settings_that_it_had(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    """Prevents a run that trains to its end and fails there, and weights that are left as they were at first because
    the checkpoint has them under the name that only masked ones have."""
    pruning: dict[str, Any] = {"density": 0.3, "score": "magnitude"}
    prune(tmp_path, pruning, save_strategy="steps", save_steps=7)
    with pytest.raises(InputError, match=expected):
        prune(tmp_path, pruning | change, resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_a_run_resumes_with_all_that_it_did(tmp_path: Path) -> None:
    """Prevents weights that are left as they were at first because the rest of the methods knows nothing of them."""
    prune(tmp_path, {"density": 0.5, "structure": ["ffn", "4x4"]}, save_strategy="steps", save_steps=7)
    checkpoint = str(tmp_path / "checkpoint-7")
    with pytest.raises(InputError, match="was compressed in more ways than this run"):
        prune(tmp_path, {"density": 0.5, "structure": ["ffn"]}, resume_from_checkpoint=checkpoint)
    prune(tmp_path, {"density": 0.5, "structure": ["ffn"]}, save_strategy="steps", save_steps=7)
    with pytest.raises(InputError, match="is of a run that did not prune 4x4"):
        prune(tmp_path, {"density": 0.5, "structure": ["ffn", "4x4"]}, resume_from_checkpoint=checkpoint)


def test_scores_have_an_optimizer_group_of_their_own(tmp_path: Path) -> None:
    """Prevents weight decay on scores, which pulls them all towards one threshold, and scores trained twice."""
    trainer = prune(tmp_path, {"density": 0.3, "score_learning_rate": 0.05}, weight_decay=0.1)
    groups = trainer.optimizer.param_groups
    scores = [mask.scores for mask in trainer.model.modules() if isinstance(mask, LearnedMask)]
    assert [len(group["params"]) for group in groups][-1] == len(scores) == 12
    assert groups[-1]["initial_lr"] == 0.05
    assert groups[-1]["weight_decay"] == 0.0
    every = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(every) == sorted(id(parameter) for parameter in trainer.model.parameters())


def test_accumulated_batches_prune_like_one(tmp_path: Path) -> None:
    """Prevents a penalty that counts once a micro-batch, and masks that move within one optimizer step."""
    flags = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    pruning = {"density": 0.3, "score": "soft_movement", "score_penalty": 30.0, "score_learning_rate": 1.0}
    whole = prune(tmp_path, pruning, model().double(), per_device_train_batch_size=4, **flags)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    split = prune(tmp_path, pruning, model().double(), **cut, **flags)
    for key, tensor in state(whole).items():
        torch.testing.assert_close(state(split)[key], tensor, rtol=0, atol=1e-9)


def test_what_would_undo_the_pruning_is_refused(tmp_path: Path) -> None:
    """Prevents the best model, from before the density was reached, from being saved as the pruned one."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(InputError, match="--load_best_model_at_end"):
        prune(tmp_path, {"density": 0.3}, **best)


@pytest.mark.parametrize("score", ["wanda", "taylor", "magnitude", "head_importance"])
def test_one_shot_prunes_without_training(tmp_path: Path, score: Any) -> None:
    """Prevents weights that a calibration trains, rows of another density, and a division by no steps."""
    structure = "heads" if score == "head_importance" else "weights"
    pruning = {"density": 0.5, "score": score, "structure": [structure], "schedule": "one_shot"}
    trainer = prune(tmp_path, pruning, max_steps=-1, num_train_epochs=0)
    names, dense = bake(trainer.model), dict(model().named_parameters())
    assert trainer.state.global_step == 0
    for name, tensor in trainer.model.named_parameters():
        assert torch.equal(tensor, torch.where(tensor == 0, tensor, dense[name]))
        if name in names and score == "wanda":
            assert tensor.count_nonzero(1).unique().tolist() == [tensor.shape[1] // 2]
        elif name in names and score != "head_importance":
            assert tensor.count_nonzero() == tensor.numel() // 2
    values = [name for name in names if name.endswith("value.weight")]
    assert all(trainer.model.get_parameter(name).count_nonzero() == 16 * 8 for name in values)


@pytest.mark.parametrize(
    ("rewind_to", "steps", "expected"),
    [(0.0, 9, [0, 1, 2, 0, 1, 2, 0, 1, 2]), (0.5, 8, [0, 1, 2, 3, 2, 3, 2, 3]), (0.5, 9, [0, 1, 2, 3, 4, 2, 3, 2, 3])],
)
def test_the_learning_rate_is_rewound(tmp_path: Path, rewind_to: float, steps: int, expected: list[int]) -> None:
    """Prevents rounds that train with what is left of the learning rate, or a last one that never comes to its end."""
    rounds = {"schedule": "iterative", "pruning_rounds": 2, "rewind": "learning_rate", "rewind_to": rewind_to}
    trainer = prune(tmp_path, {"density": 0.25, "score": "magnitude"} | rounds, max_steps=steps, warmup_steps=1)
    lines = [line for line in trainer.state.log_history if "learning_rate" in line]
    first = max(expected) + 1
    rates = [0.0] + [(first - step) / (first - 1) * 1e-2 for step in range(1, first)]  # a step of warm-up, then linear
    assert [line["learning_rate"] for line in lines] == pytest.approx([rates[place] for place in expected])
    begins = [step for step in range(1, steps) if expected[step] <= expected[step - 1]]
    assert [line["density"] for line in lines] == pytest.approx(
        [0.5 ** sum(step + 1 >= begin for begin in begins) for step in range(steps)], abs=2e-3
    )


def test_a_learning_rate_that_cannot_be_rewound_is_refused(tmp_path: Path) -> None:
    """Prevents a schedule that goes on falling where it was to begin again."""
    rounds = {"density": 0.25, "score": "magnitude", "schedule": "iterative", "rewind": "learning_rate"}
    with pytest.raises(InputError, match="cannot be rewound: give linear, or cosine"):
        prune(tmp_path, rounds, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")


def test_one_shot_trains_what_is_left(tmp_path: Path) -> None:
    """Prevents masks that are only made once the run is over."""
    trainer = prune(tmp_path, {"density": 0.5, "score": "wanda", "schedule": "one_shot"}, logging_steps=1)
    assert {line["density"] for line in trainer.state.log_history if "density" in line} == {0.5}


def test_what_one_shot_left_nothing_of_trains_on(tmp_path: Path) -> None:
    """Prevents a module that is all pruned, and so without a gradient, from passing for one outside the loss."""
    pruning = {"density": 0.02, "score": "taylor", "ranking": "global", "schedule": "one_shot"}
    trainer = prune(tmp_path, pruning)
    assert min(density_by_weight(trainer.model, bake(trainer.model)).values()) == 0


def test_activations_are_replaced_in_the_same_run(tmp_path: Path) -> None:
    """Prevents activations that are changed before they are trained with, or never."""
    trainer = prune(tmp_path, {"density": 0.5, "score": "magnitude", "gelu_to_relu": True})
    shares = [line["relu_share"] for line in trainer.state.log_history if "relu_share" in line]
    assert shares == pytest.approx([min(1, max(0, (step / 8 - 0.1) / 0.6)) for step in range(1, 9)])
    assert trainer.model.config.hidden_act == "relu"
    assert not any("GELU" in type(module).__name__ for module in trainer.model.modules())


def test_a_short_run_is_refused(tmp_path: Path) -> None:
    """Prevents a run that ends before its density is reached."""
    with pytest.raises(InputError, match="the run has 2 optimizer steps"):
        prune(tmp_path, {"density": 0.3}, max_steps=2)


TWO_PROCESSES = """
import sys
from safetensors.torch import save_file
from test_pruning import CASES, SGD, model, prune, state

trainer = prune(sys.argv[1], CASES[sys.argv[2]], model().double(), per_device_train_batch_size=2, **SGD)
assert trainer.accelerator.num_processes == 2
sent = {id(buffer) for buffer in trainer.model_wrapped.modules_buffers}
masks = [buffer for name, buffer in trainer.model.named_buffers() if ".parametrizations." in name]
assert masks and not any(id(buffer) in sent for buffer in masks)
save_file(state(trainer), f"{sys.argv[1]}/{trainer.args.process_index}")
"""
CASES: dict[str, dict[str, Any]] = {
    "learned": {
        "density": 0.3,
        "structure": ["heads", "weights"],
        "score": "soft_movement",
        "score_init": "noise",
        "score_learning_rate": 1.0,
    },
    "drawn": {"density": 0.3, "score": "l0", "score_learning_rate": 1.0},
    "calibrated": {"density": 0.3, "score": "wanda", "calibration_samples": 4},
}
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


def run_two(script: str, folder: Path, case: str) -> list[dict[str, torch.Tensor]]:
    """What each process of a script has saved."""
    (folder / "two.py").write_text(script)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parent)}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, folder / "two.py", folder, case], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [load_file(folder / str(process)) for process in range(2)]


@pytest.mark.parametrize("case", ["learned", "drawn"])
def test_two_processes_prune_like_one(tmp_path: Path, case: str) -> None:
    """Prevents masks that differ between processes, each of which would train a model of its own, or that are sent
    from one to the other with every forward pass."""
    first, second = run_two(TWO_PROCESSES, tmp_path, case)
    one = prune(tmp_path, CASES[case], model().double(), per_device_train_batch_size=4, **SGD)
    for key, tensor in state(one).items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], tensor, rtol=0, atol=1e-9)


def test_two_processes_go_on_with_what_the_first_has_found(tmp_path: Path) -> None:
    """Prevents masks that part because two processes have not found quite the same on their examples."""
    other_examples = """
import os
import test_pruning

rows = test_pruning.rows
if os.environ["RANK"] == "1":
    test_pruning.rows = lambda count=16: rows(count).select(range(count - 1, -1, -1))
"""
    first, second = run_two(other_examples + TWO_PROCESSES, tmp_path, "calibrated")
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
