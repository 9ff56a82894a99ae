"""nn_pruning's arguments drive our trainer to its masks, or are refused."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tests.compression.pruning.nn_pruning_models import BATCH, RUNS, attach, patched, tiny

from prunelle.compression import bake
from prunelle.compression.pruning.nn_pruning_bridge import methods_of, read_arguments
from prunelle.errors import InputError
from prunelle.trainers import FinetuningArguments, PruningArguments, PruningTrainer

# Arguments that a training is to follow.
TRAININGS: dict[str, dict[str, Any]] = {
    "single weights": {"final_threshold": 0.3},
    "blocks, biases that stay": RUNS["blocks, other ones for the attention output"] | {"bias_mask": False},
    "the published hybrid": RUNS["the published hybrid"]
    | {
        "initial_threshold": 0.0,
        "final_threshold": 0.5,
        "regularization": "l1",
        "regularization_final_lambda": 20.0,
        "attention_lambda": 2.0,
        "dense_lambda": 0.5,
    },
    "attention alone, down to the fewest": {
        "attention_pruning_method": "threshold",
        "attention_output_with_dense": False,
        "dense_pruning_method": "disabled",
        "initial_threshold": -1.0,
        "final_threshold": 1.0,
        "linear_min_parameters": 0.1,
        "regularization": "l0",
        "regularization_final_lambda": 1.0,
    },
    "dimensions by threshold": {
        "attention_pruning_method": "threshold",
        "dense_pruning_method": "threshold:1d_alt",
        "initial_threshold": -0.1,
        "final_threshold": 0.02,
    },
    "activations too": {"final_threshold": 0.6, "final_warmup": 0, "gelu_patch": True, "gelu_patch_steps": 7},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_its_arguments_drive_a_training_to_its_masks(name: str, tmp_path: Path) -> None:
    """Prevents an argument that is read and does nothing: schedule, scores, penalties and masks are all its own."""
    options, steps, warmup_steps = TRAININGS[name] | {"mask_scores_learning_rate": 0.02}, 12, 2
    tokens = torch.randint(40, (4 * steps, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4 * steps) % 3

    theirs, coordinator = patched(options, draw=False)
    theirs.train()
    groups = coordinator.create_optimizer_groups(
        theirs, SimpleNamespace(learning_rate=1e-2, weight_decay=0.0), coordinator.sparse_args
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = transformers.get_linear_schedule_with_warmup(optimizer, warmup_steps, steps)
    for step in range(steps):
        coordinator.schedule_threshold(step, steps, warmup_steps, training=True)
        batch = slice(4 * step, 4 * step + 4)
        loss = theirs(tokens[batch], torch.ones(4, 8), labels=labels[batch]).loss
        penalty, weight, _ = coordinator.regularization_loss(theirs)
        (loss + penalty * weight).backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    coordinator.schedule_threshold(training=False)
    theirs.eval()

    arguments = FinetuningArguments(
        str(tmp_path / "run"),
        max_steps=steps,
        warmup_steps=warmup_steps,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        optim="adamw_torch",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    columns = {"input_ids": tokens.tolist(), "attention_mask": [[1] * 8] * len(tokens), "labels": labels.tolist()}
    pruning = PruningArguments(nn_pruning_config=str(arguments_file(tmp_path, **options)))
    trainer = PruningTrainer(tiny(), arguments, pruning, train_dataset=Dataset.from_dict(columns))
    trainer.train()

    ours = trainer.model.eval()
    masked = [name for name, module in theirs.named_modules() if type(module).__name__ == "MaskedLinear"]
    kept = 0
    for name in masked:
        weight, bias = theirs.get_submodule(name).get_masked_weights_bias()
        module = ours.get_submodule(name)
        assert torch.equal(module.weight != 0, weight != 0), name
        assert torch.equal(module.bias != 0, bias != 0), name
        torch.testing.assert_close(module.weight, weight)
        kept += int((weight != 0).sum())
    assert 0 < kept < 0.99 * sum(theirs.get_submodule(name).weight.numel() for name in masked)
    torch.testing.assert_close(ours(**BATCH).logits, theirs(**BATCH).logits)
    assert bake(ours)


def test_its_dimensions_go_whole(tmp_path: Path) -> None:
    """Prevents masks that differ where nn_pruning's mean the same: it keeps a part of a row to get a number right."""
    theirs, coordinator = patched(RUNS["the published hybrid"] | {"dense_pruning_method": "topK:1d_alt"})
    coordinator.schedule_threshold(training=False)  # 0.4 of 24 dimensions, 9.6
    kept = theirs.bert.encoder.layer[0].intermediate.dense.get_masked_weights_bias()[0] != 0
    assert sorted(kept.sum(1).tolist()) == [0] * 14 + [9] + [16] * 9
    arguments = read_arguments(arguments_file(tmp_path, **RUNS["the published hybrid"]))
    arguments = dataclasses.replace(arguments, dense_pruning_method="topK:1d_alt", initial_threshold=1.0)
    (_, method) = methods_of(arguments, 0)
    attach(theirs, [method])
    method.start(10)
    method.step(1.0)
    mask = method.masks["bert.encoder.layer.0.intermediate.dense.weight"].mask
    assert torch.equal(mask.flatten() > 0, kept.all(1))
    method.finish()


def arguments_file(folder: Path, **options: Any) -> Path:
    file = folder / "sparse_args.json"
    file.write_text(json.dumps(options))
    return file


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a method that crashes": ({"dense_pruning_method": "magnitude"}, "dense_pruning_method magnitude: nn_pruning has"),
    "a submethod that crashes": ({"attention_pruning_method": "topK:joint"}, "topK:joint: in nn_pruning it fails"),
    "scores that cannot move": ({"dense_pruning_method": "topK:1d"}, "topK:1d: in nn_pruning it fails, or its scores"),
    "gates": ({"attention_pruning_method": "l0"}, "--score l0 and --density"),
    "several dimensions as one": (
        {"dense_pruning_method": "topK:1d_alt", "dense_block_rows": 4},
        "must be 1 x 1",
    ),
    "a density above 1": ({"final_threshold": 1.5}, "to final_threshold 1.5"),
    "a density at first": ({"initial_threshold": 0.9}, "from initial_threshold 0.9"),
    "patterns": ({"ampere_pruning_method": "annealing"}, "--structure 2:4"),
    "a start that is ignored": ({"mask_init": "kaiming"}, "ignored by nn_pruning"),
    "another penalty": ({"regularization": "l2"}, "neither disabled nor l1 nor l0"),
    "a second run": ({"final_finetune": True}, "a run of its own"),
    "other means of norms": ({"layer_norm_patch": True, "layer_norm_patch_start_delta": 0.9}, "forgotten in 100"),
    "heads that stay": ({"rewind_model_name_or_path": "x"}, "whose heads are to stay"),
    "a word for a number": ({"final_threshold": "0.5"}, 'final_threshold cannot be "0.5"; by default it is 0.5'),
    "no learning rate": ({"mask_scores_learning_rate": 0}, "mask_scores_learning_rate 0 must be above 0"),
    "a negative penalty": ({"dense_lambda": -1}, "dense_lambda -1 must not be negative"),
    "nothing": (
        {"dense_pruning_method": "disabled", "attention_pruning_method": "disabled"},
        "both disabled",
    ),
    "no weight of the labels": ({"distil_teacher_name_or_path": "x", "distil_alpha_ce": 0}, "distil_alpha_ce and"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_cannot_be_followed_are_refused(case: str, tmp_path: Path) -> None:
    """Prevents an argument from being passed over in silence."""
    options, message = REFUSED[case]
    with pytest.raises(InputError, match=re.escape(message)):
        PruningArguments(nn_pruning_config=str(arguments_file(tmp_path, **options)))


def test_a_run_too_short_for_its_arguments_is_refused(tmp_path: Path) -> None:
    """Prevents a threshold that jumps, and GeLUs that are left in the end."""
    (attention, _, gelu) = methods_of(read_arguments(arguments_file(tmp_path, gelu_patch=True)), 5)
    attention.start(16)
    with pytest.raises(InputError, match=r"for 5 at first .* and for 10 in the end"):
        attention.start(15)
    with pytest.raises(InputError, match="GeLU is to be ReLU after 50000 steps, and the run has 16 optimizer steps"):
        gelu.start(16)
    (attention, _) = methods_of(read_arguments(arguments_file(tmp_path, final_threshold=1e-4)), 0)
    with pytest.raises(InputError, match="keeps none of"):
        attention.attach(tiny())


def test_a_file_of_arguments_stands_alone(tmp_path: Path) -> None:
    """Prevents flags that say otherwise from being passed over."""
    with pytest.raises(InputError, match="leave out --density, or the file"):
        PruningArguments(nn_pruning_config=str(arguments_file(tmp_path)), density=[0.3])
    with pytest.raises(InputError, match="is not JSON that can be read"):
        PruningArguments(nn_pruning_config=str(tmp_path / "none.json"))
