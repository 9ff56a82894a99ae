"""The masks are nn_pruning's, bit for bit, for every way of pruning that it can still run.

`topK`, `threshold` and `sigmoied_threshold` of single weights, blocks and `1d_alt` while they train, `l0` by its gates,
the ampere method `sigmoied_threshold` by its pattern. The others are below, as `BROKEN` with the way in which they
fail, or in tests of what they do instead: `1d`, whose scores never move, and the ampere method `annealing`, whose
patterns lie along the outputs. (`magnitude` crashes, but has a binarizer of its own to compare with.)
"""

from typing import Any
from unittest import mock

import pytest
import torch
from tests.compression.pruning.nn_pruning_models import BATCH, attach, patched, tiny
from torch import nn
from transformers import PreTrainedModel

from prunelle.compression.pruning import CubicSchedule, Pruning, keep_highest

ATTENTION = ["*.attention.*"]
FFN = ["*.intermediate.dense", "*.layer.?.output.dense"]


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
