"""The masks are nn_pruning's, bit for bit, for every way of pruning that it can still run.

`topK`, `threshold` and `sigmoied_threshold` of single weights, blocks and `1d_alt` while they train, `l0` by its gates,
the ampere method `sigmoied_threshold` by its pattern. The others are below, as `BROKEN` with the way in which they
fail, or in tests of what they do instead: `1d`, whose scores never move, and the ampere method `annealing`, whose
patterns lie along the outputs. (`magnitude` crashes, but has a binarizer of its own to compare with.)
"""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, PreTrainedModel

import prunelle
from prunelle.compression import bake
from prunelle.compression.pruning import CubicSchedule, Pruning, keep_highest
from prunelle.compression.pruning.masks import LearnedMask
from prunelle.compression.pruning.nn_pruning_bridge import import_patch_coordinator, methods_of, read_arguments
from prunelle.errors import InputError
from prunelle.trainers import FinetuningArguments, PruningArguments, PruningTrainer

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BATCH = {"input_ids": torch.arange(4, 28).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
ATTENTION = ["*.attention.*"]
FFN = ["*.intermediate.dense", "*.layer.?.output.dense"]


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=3, initializer_range=0.3)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def patched(options: dict[str, Any], draw: bool = True) -> tuple[PreTrainedModel, Any]:
    """A model in nn_pruning's hands, with random scores or its own, which are 0; and its coordinator."""
    module = import_patch_coordinator()
    coordinator = module.ModelPatchingCoordinator(
        module.SparseTrainingArguments(**options), "cpu", None, ["logits"], None
    )
    model = tiny()
    coordinator.patch_model(model)
    for name, parameter in model.eval().named_parameters():
        if "mask_scores" in name and draw:
            nn.init.normal_(parameter)
    return model, coordinator


def scores_of(masked: Any) -> nn.Parameter:
    """The scores of one of nn_pruning's masked modules."""
    contexts = masked.mask_module.context_modules if masked.args.ampere_method == "disabled" else []
    found = [context for context in contexts if context is not None]
    (context,) = found or [masked.ampere_module.context_module]
    return context.mask_scores


def attach(theirs: PreTrainedModel, methods: list[Pruning]) -> PreTrainedModel:
    """The same model in our hands, with the same scores."""
    ours = tiny()
    with torch.no_grad():
        for method in methods:
            method.attach(ours)
            for name, mask in method.masks.items():
                scores = scores_of(theirs.get_submodule(name.removesuffix(".weight")))
                if isinstance(mask, LearnedMask):
                    mask.scores.copy_(scores.view_as(mask.scores))
    return ours


def compare(ours: PreTrainedModel, theirs: PreTrainedModel, methods: list[Pruning]) -> None:
    names = [name.removesuffix(".weight") for method in methods for name in method.masks]
    assert len(names) == len(set(names)) == 12
    for name in names:
        weight, bias = theirs.get_submodule(name).get_masked_weights_bias()
        assert torch.equal(ours.get_submodule(name).weight, weight), name
        assert torch.equal(ours.get_submodule(name).bias, bias), name


def pruning(density: float, structure: str, patterns: list[str], score: Any = "movement", **options: Any) -> Pruning:
    schedule = CubicSchedule(density, 0.0, 0.0)
    return Pruning(schedule, score, structure=structure, patterns=patterns, ranking="tensor", **options)


# What nn_pruning is told, and the structures of attention and feed-forward network that say the same.
WAYS: dict[str, tuple[dict[str, Any], list[tuple[str, list[str]]]]] = {
    "single weights": (
        {"bias_mask": False},
        [("weights", ATTENTION), ("weights", FFN)],
    ),
    "blocks": (
        {
            "attention_block_rows": 4,
            "attention_block_cols": 4,
            "dense_block_rows": 4,
            "dense_block_cols": 2,
            "attention_output_with_dense": False,
        },
        [("4x4", ATTENTION), ("4x2", FFN)],
    ),
    "hybrid": (
        {
            "attention_block_rows": 4,
            "attention_block_cols": 4,
            "attention_output_with_dense": False,
            "dense_pruning_method": "topK:1d_alt",
        },
        [("ffn", FFN), ("4x4", ATTENTION)],
    ),
    "hybrid, attention output by columns": (
        {"attention_block_rows": 8, "attention_block_cols": 2, "dense_pruning_method": "topK:1d_alt"},
        [("ffn", FFN), ("columns", ["*.attention.output.dense"]), ("8x2", ["*.self.*"])],
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_movement_leads_to_the_same_masks(way: str) -> None:
    """Prevents scores that learn otherwise than published: masks and biases after steps of training are the same."""
    options, structures = WAYS[way]
    theirs, coordinator = patched(options)
    methods = [pruning(0.25, structure, patterns) for structure, patterns in structures]
    ours = attach(theirs, methods)
    at_first = [group.learned.detach().clone() for method in methods for group in method.groups]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, theirs)]
    for progress in (0.0, 0.1, 0.2, 0.3, 1.0):
        # nn_pruning rounds the number of units that it keeps down: these shares need no rounding.
        density = {0.0: 1.0, 1.0: 0.25}.get(progress, 0.75)
        coordinator.patcher_context.set_context_data("threshold", density)
        for method in methods:
            with mock.patch.object(CubicSchedule, "at", lambda *_, density=density: density):
                method.step(progress)
        compare(ours, theirs, methods)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(**BATCH).logits, torch.tensor([0, 2])).backward()
            optimizer.step()
    groups = [group for method in methods for group in method.groups]
    unmoved = [keep_highest(scores.flatten(), scores.numel() // 4) for scores in at_first]
    assert any(not torch.equal(kept, group.kept) for kept, group in zip(unmoved, groups, strict=True))


@pytest.mark.parametrize("method", ["threshold", "sigmoied_threshold"])
def test_a_threshold_leaves_the_same_masks_as_its_density(method: str) -> None:
    """Prevents soft movement from being another method than the published one."""
    options = {"dense_pruning_method": method, "attention_pruning_method": method, "bias_mask": False}
    theirs, coordinator = patched(options)
    coordinator.patcher_context.set_context_data("threshold", 0.1 if method == "threshold" else 0.55)
    masked = [module for module in theirs.modules() if type(module).__name__ == "MaskedLinear"]
    kept = sum(int((module.get_masked_weights_bias()[0] != 0).sum()) for module in masked)
    total = sum(module.weight.numel() for module in masked)
    assert 0.2 < kept / total < 0.8
    soft = Pruning(CubicSchedule(kept / total, 0.0, 0.0), "soft_movement")
    ours = attach(theirs, [soft])
    soft.step(1.0)
    compare(ours, theirs, [soft])


def test_gates_are_the_same() -> None:
    """Prevents hard concrete gates from being another distribution than the published one."""
    options = {"dense_pruning_method": "l0", "attention_pruning_method": "l0", "bias_mask": False}
    theirs, coordinator = patched(options)
    coordinator.patcher_context.set_context_data("threshold", 1.0)  # which it asks for, and does nothing with
    gates = Pruning(CubicSchedule(1.0, 0.0, 0.0), "l0")
    ours = attach(theirs, [gates])
    gates.step(0.5)
    compare(ours, theirs, [gates])
    ours.train()
    theirs.train()
    for name, mask in gates.masks.items():
        masked = theirs.get_submodule(name.removesuffix(".weight"))
        torch.manual_seed(1)
        uniform = torch.zeros_like(masked.weight).uniform_().clamp(0.0001, 0.9999)  # as it draws
        mask.noise.copy_(uniform.logit())
        torch.manual_seed(1)
        weight, _ = masked.get_masked_weights_bias()
        torch.testing.assert_close(ours.get_submodule(name.removesuffix(".weight")).weight, weight)
        assert 0 < (weight == 0).float().mean() < 1


# What it can no longer run, and how it fails: where a model is patched, or where it computes.
BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str | None]] = {
    "magnitude": ({"dense_pruning_method": "magnitude"}, TypeError, "'NoneType' object is not subscriptable"),
    "joint": ({"attention_pruning_method": "topK:joint"}, AssertionError, None),
    "joint, of dense modules": ({"dense_pruning_method": "topK:joint"}, AssertionError, None),
    "1d on attention": ({"attention_pruning_method": "topK:1d"}, RuntimeError, "Unknown context module kind"),
    "1d_alt on attention": ({"attention_pruning_method": "topK:1d_alt"}, RuntimeError, "Unknown context module kind"),
    "1d_only": ({"dense_pruning_method": "topK:1d_only"}, RuntimeError, "Unknown pruning sub method '1d_only'"),
    "ampere topK": ({"ampere_pruning_method": "topK"}, Exception, "Unknown ampere method topK"),
    "ampere threshold": ({"ampere_pruning_method": "threshold"}, RuntimeError, "Unknown ampere pruning method"),
}


@pytest.mark.parametrize("way", BROKEN)
def test_what_is_not_compared_cannot_run(way: str) -> None:
    """Prevents a way of pruning from being left out of the comparison without need."""
    options, error, message = BROKEN[way]
    with pytest.raises(error, match=message):
        evaluated(options)


def evaluated(options: dict[str, Any]) -> torch.Tensor:
    theirs, coordinator = patched(options)
    coordinator.schedule_threshold(training=False)
    return theirs(**BATCH).logits


def test_rows_times_columns_never_learn() -> None:
    """Prevents `1d` from being taken for a way of pruning: its masks are of scores that are 0 and have no gradient."""
    theirs, coordinator = patched({"dense_pruning_method": "topK:1d"}, draw=False)
    coordinator.schedule_threshold(10, 20, 1, training=True)
    nn.functional.cross_entropy(theirs.train()(**BATCH).logits, torch.tensor([0, 2])).backward()
    masked = theirs.bert.encoder.layer[0].intermediate.dense
    for side in masked.mask_module.context_modules:
        assert not side.mask_scores.any()
        assert not side.mask_scores.grad.any()
    coordinator.schedule_threshold(training=False)
    kept = masked.get_masked_weights_bias()[0] != 0
    assert kept.float().mean() == 0.5  # whichever half its sorting puts first


def test_annealed_patterns_lie_along_the_outputs() -> None:
    """Prevents `annealing` from being taken for the 2:4 pattern of hardware: of each input's weights 2 in 4 stay."""
    flags = {"dense_pruning_method": "disabled", "attention_pruning_method": "disabled", "bias_mask": False}
    theirs, coordinator = patched(flags | {"ampere_pruning_method": "annealing"})
    masked = theirs.bert.encoder.layer[0].intermediate.dense
    coordinator.schedule_threshold(training=False)
    kept = masked.get_masked_weights_bias()[0] != 0
    assert (kept.unflatten(0, (-1, 4)).sum(1) == 2).all()
    assert not (kept.unflatten(1, (-1, 4)).sum(2) == 2).all()
    coordinator.schedule_threshold(10, 20, 1, training=True)  # while it learns, a mixture of all patterns
    mixture = masked.train().get_masked_weights_bias()[0] / masked.weight
    assert ((mixture > 0) & (mixture < 1)).float().mean() > 0.5


def test_a_pattern_is_the_same() -> None:
    """Prevents 2:4 masks that lie along the outputs."""
    flags = {"dense_pruning_method": "disabled", "attention_pruning_method": "disabled", "bias_mask": False}
    theirs, coordinator = patched(flags | {"ampere_pruning_method": "sigmoied_threshold"})
    coordinator.patcher_context.set_context_data_dict({"threshold": 0.5, "ampere_temperature": 0.5})
    method = Pruning(CubicSchedule(0.5, 0.0, 0.0), structure="2:4")
    ours = attach(theirs, [method])
    method.step(1.0)
    compare(ours, theirs, [method])


def test_magnitudes_leave_the_same_masks() -> None:
    """Prevents another order of magnitudes than the published one."""
    from nn_pruning.modules.binarizer import MagnitudeBinarizer

    method, model = pruning(0.25, "weights", [], "magnitude"), tiny()
    method.attach(model)
    method.step(1.0)
    for name, mask in method.masks.items():
        weight = model.get_submodule(name.removesuffix(".weight")).parametrizations.weight.original
        assert torch.equal(mask.mask, MagnitudeBinarizer.apply(weight.detach(), 0.25))


# Runs whose checkpoints are to be read: its `SparseTrainingArguments`, beyond the defaults.
RUNS: dict[str, dict[str, Any]] = {
    "single weights": {"final_threshold": 0.3},
    "biases that stay": {"final_threshold": 0.1, "bias_mask": False},
    "blocks, other ones for the attention output": {
        "attention_block_rows": 8,
        "attention_block_cols": 2,
        "attention_output_with_dense": False,
        "dense_block_cols": 4,
    },
    "the published hybrid": {
        "attention_pruning_method": "sigmoied_threshold",
        "attention_block_rows": 4,
        "attention_block_cols": 4,
        "dense_pruning_method": "sigmoied_threshold:1d_alt",
        "final_threshold": 0.4,
    },
    "a threshold that nothing reaches": {
        "attention_pruning_method": "sigmoied_threshold",
        "dense_pruning_method": "threshold",
        "final_threshold": 0.999,
        "linear_min_parameters": 0.1,
    },
    "dimensions, and a part of one": {"dense_pruning_method": "topK:1d_alt", "final_threshold": 0.4},
    "rows times columns": {"dense_pruning_method": "topK:1d", "final_threshold": 0.2},
    "gates": {"attention_pruning_method": "l0", "dense_pruning_method": "l0"},
    "a pattern along the inputs": {"ampere_pruning_method": "sigmoied_threshold", "attention_block_rows": 4},
    "a pattern along the outputs": {
        "ampere_pruning_method": "annealing",
        "attention_pruning_method": "disabled",
        "dense_pruning_method": "disabled",
    },
    "activations that became ReLUs": {"gelu_patch": True},
}


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


def save(model: PreTrainedModel, coordinator: Any, folder: Path) -> None:
    """As its trainer does with transformers 4."""
    folder.mkdir(exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "sparse_args.json").write_text(json.dumps(dataclasses.asdict(coordinator.sparse_args)))


@pytest.mark.parametrize("run", RUNS)
def test_a_masked_checkpoint_is_read(run: str, tmp_path: Path) -> None:
    """Prevents a checkpoint from coming back dense, since stock classes pass over the scores that they do not know."""
    theirs, coordinator = patched(RUNS[run])
    coordinator.schedule_threshold(training=False)
    save(theirs, coordinator, tmp_path)
    ours, loading = prunelle.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        assert torch.equal(ours(**BATCH).logits, theirs(**BATCH).logits)
    ours.save_pretrained(tmp_path / "again")
    stock = type(ours).from_pretrained(tmp_path / "again")
    assert torch.equal(stock(**BATCH).logits, ours(**BATCH).logits)


def test_its_no_norms_are_read(tmp_path: Path) -> None:
    """Prevents LayerNorms from being put back, whose weights have the same names."""
    options = {"layer_norm_patch": True, "layer_norm_patch_steps": 6, "attention_pruning_method": "disabled"}
    theirs, coordinator = patched(options | {"attention_output_with_dense": False})
    for step in range(8):
        coordinator.schedule_threshold(step, 8, 1, training=True)
        theirs.train()(**BATCH)
    coordinator.schedule_threshold(training=False)
    logits = theirs.eval()(**BATCH).logits
    save(theirs, coordinator, tmp_path / "masked")
    with mock.patch.object(type(theirs), "prune_heads", prune_heads, create=True):
        coordinator.compile_model(theirs)
    assert theirs.config.layer_norm_type == "no_norm"
    torch.testing.assert_close(theirs(**BATCH).logits, logits)
    save(theirs, coordinator, tmp_path / "compiled")
    for folder in ("masked", "compiled"):
        config = AutoConfig.from_pretrained(tmp_path / folder)
        prunelle.from_pretrained(str(tmp_path / folder), config=config)  # which stays as it is
        ours, loading = prunelle.from_pretrained(str(tmp_path / folder), config=config, output_loading_info=True)
        assert not any(loading.values()), loading
        torch.testing.assert_close(ours(**BATCH).logits, logits)
        ours.save_pretrained(tmp_path / "again")
        again = prunelle.from_pretrained(str(tmp_path / "again"))
        assert torch.equal(again(**BATCH).logits, ours(**BATCH).logits)


def test_a_compiled_checkpoint_is_read(tmp_path: Path) -> None:
    """Prevents heads that are counted wrong: its compiler takes them out, and the configuration alone says which."""
    theirs, coordinator = patched(RUNS["the published hybrid"])
    coordinator.schedule_threshold(training=False)
    with torch.no_grad():
        for name, scores in theirs.named_parameters():
            if ".self." in name and name.endswith("mask_scores"):
                scores.fill_(1.0)
                if ".value." in name:
                    scores[[1, 3] if "layer.0" in name else [0]] = -1.0
        logits = theirs(**BATCH).logits
    with mock.patch.object(type(theirs), "prune_heads", prune_heads, create=True):
        assert coordinator.compile_model(theirs) == (3, 8)
        torch.testing.assert_close(theirs(**BATCH).logits, logits)
    save(theirs, coordinator, tmp_path)
    ours = prunelle.from_pretrained(str(tmp_path))
    assert [shape["heads"] for shape in ours.config.layer_shapes] == [[0, 2], [1, 2, 3]]
    assert torch.equal(ours(**BATCH).logits, theirs(**BATCH).logits)
    ours.save_pretrained(tmp_path / "again")
    again = prunelle.from_pretrained(str(tmp_path / "again"))
    assert torch.equal(again(**BATCH).logits, ours(**BATCH).logits)


def prune_heads(model: PreTrainedModel, heads: dict[int, list[int]]) -> None:
    """What transformers before 5 had for models."""
    model.config.pruned_heads = heads
    for number, gone in heads.items():
        attention = model.bert.encoder.layer[number].attention
        size = attention.self.attention_head_size
        kept = [place for place in range(model.config.hidden_size) if place // size not in gone]
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            linear.weight, linear.bias = nn.Parameter(linear.weight[kept]), nn.Parameter(linear.bias[kept])
        attention.output.dense.weight = nn.Parameter(attention.output.dense.weight[:, kept])
        attention.self.num_attention_heads -= len(gone)
        attention.self.all_head_size = len(kept)


def test_scores_that_nobody_can_read_are_refused(tmp_path: Path) -> None:
    """Prevents a guess at how they become masks."""
    save(*patched({}), tmp_path)
    file = tmp_path / "sparse_args.json"
    file.write_text(json.dumps({"rewind_model_name_or_path": "somewhere"}))
    with pytest.raises(InputError, match="kept the heads of somewhere, whatever"):
        prunelle.from_pretrained(str(tmp_path))
    file.write_text(json.dumps({"final_treshold": 0.1}))
    with pytest.raises(InputError, match="final_treshold, which is none of nn_pruning's"):
        prunelle.from_pretrained(str(tmp_path))
    file.unlink()
    with pytest.raises(InputError, match="no sparse_args"):
        prunelle.from_pretrained(str(tmp_path))
