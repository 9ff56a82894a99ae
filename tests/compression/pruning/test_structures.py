"""What goes as one: masks, scores and gradients of units against naive references, and models that shrink."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression import bake
from prunelle.compression.anatomy import dissect, matrix
from prunelle.compression.pruning import CubicSchedule, Pruning, shrink
from prunelle.compression.pruning.masks import LearnedMask
from prunelle.errors import InputError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "num_labels": 3,
}
OTHER_NAMES = {"vocab_size": 40, "pad_token_id": 1, "num_labels": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "DistilBert": {**OTHER_NAMES, "dim": 16, "hidden_dim": 24, "n_heads": 4, "n_layers": 2},
    "ModernBert": {**SIZES, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    "GPT2": {**OTHER_NAMES, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24},
}
BATCH = {"input_ids": torch.arange(4, 28).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
LABELS = torch.tensor([0, 2])


def tiny(name: str = "Bert") -> PreTrainedModel:
    """All weights random, biases too."""
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}ForSequenceClassification")
    model = model_class(model_class.config_class(**CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def attached(model: PreTrainedModel, structure: str, score: Any = "movement", **options: Any) -> Pruning:
    """With learned scores that follow from no weight."""
    method = Pruning(CubicSchedule(0.5, 0.0, 0.0), score, structure=structure, **options)
    method.attach(model)
    with torch.no_grad():
        for group in method.groups:
            if group.learned is not None:
                group.learned.copy_(torch.randn(group.learned.shape))
    return method


def places(model: PreTrainedModel, structure: str) -> dict[str, list[dict[str, Tensor]]]:
    """Of each ranked group its units, each as the places (True) that it takes of (outputs, inputs) matrices."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for layer in dissect(model):
        units = {"heads": layer.heads, "ffn": layer.ffn}
        if structure in units:
            group = units[structure]
            name, consumer = group.consumer
            shapes = {key: matrix(module).shape for key, module in {**group.producers, name: consumer}.items()}
            found[f"{layer.name} {structure}"] = [
                {
                    key: torch.zeros(shape).bool().index_fill(0, group.outputs([unit]), True)
                    if key != name
                    else torch.zeros(shape).bool().index_fill(1, group.inputs([unit]), True)
                    for key, shape in shapes.items()
                }
                for unit in range(group.count)
            ]
            continue
        for group in units.values():
            for key, module in {**group.producers, group.consumer[0]: group.consumer[1]}.items():
                height, width = matrix(module).shape
                rows = {"4x2": 4, "columns": height}.get(structure, 1)
                columns = {"4x2": 2, "rows": width}.get(structure, 1)
                found[key] = []
                for top in range(0, height, rows):
                    for left in range(0, width, columns):
                        place = torch.zeros(height, width, dtype=torch.bool)
                        place[top : top + rows, left : left + columns] = True
                        found[key].append({key: place})
    return found


def masks(model: PreTrainedModel, method: Pruning) -> dict[str, Tensor]:
    """The whole masks as (outputs, inputs), as a model of ones shows them."""
    shown = {}
    for name, mask in method.masks.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        whole = mask(torch.ones_like(module.weight)).detach()
        shown[name.removesuffix(".weight")] = (whole if isinstance(module, nn.Linear) else whole.T).bool()
    return shown


def naive_keep(scores: list[float], count: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda unit: -scores[unit])
    return [unit in order[:count] for unit in range(len(scores))]


@pytest.mark.parametrize("structure", ["4x2", "rows", "columns", "heads", "ffn"])
@pytest.mark.parametrize("ranking", ["tensor", "global"])
@pytest.mark.parametrize("name", CONFIGS)
def test_masks_of_units_are_those_of_a_naive_reference(name: str, ranking: Any, structure: str) -> None:
    """Prevents a mask that lies across units, differs between the weights of one, or ranks by another's magnitude."""
    model = tiny(name)
    units = places(model, structure)
    weights = {key: matrix(model.get_submodule(key)).detach().double() for group in units.values() for key in group[0]}
    magnitudes = {
        key: [
            (
                sum(weights[name][place].abs().sum() for name, place in unit.items())
                / sum(place.sum() for place in unit.values())
            ).item()
            for unit in group
        ]
        for key, group in units.items()
    }
    method = attached(model, structure, "magnitude", ranking=ranking)
    method.step(0.5)
    density = method.schedule.at(0.5)
    expected = {key: torch.zeros_like(weight).bool() for key, weight in weights.items()}
    together = [score for scores in magnitudes.values() for score in scores]
    all_kept = naive_keep(together, round(density * len(together)))
    for key, group in units.items():
        kept = naive_keep(magnitudes[key], round(density * len(group)))
        if ranking == "global":
            kept, all_kept = all_kept[: len(group)], all_kept[len(group) :]
        for unit, stays in zip(group, kept, strict=True):
            for weight, place in unit.items():
                expected[weight] |= place & stays
    shown = masks(model, method)
    assert shown.keys() == expected.keys()
    for key, mask in expected.items():
        assert torch.equal(shown[key], mask), key


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("structure", ["4x2", "rows", "columns", "heads", "ffn"])
def test_a_units_score_gets_the_gradient_of_all_its_weights(name: str, structure: str) -> None:
    """Prevents heads that learn from their queries alone, and scores whose units stand in another order."""
    model = tiny(name).double()
    units = places(model, structure)
    method = attached(model, structure)
    method.step(0.3)
    nn.functional.cross_entropy(model(**BATCH).logits, LABELS).backward()
    plain = copy.deepcopy(model)
    bake(plain)
    plain.zero_grad()
    nn.functional.cross_entropy(plain(**BATCH).logits, LABELS).backward()
    for group in method.groups:
        naive = []
        for unit in units[group.group.name]:
            naive.append(0.0)
            for key, place in unit.items():
                masked = plain.get_submodule(key)
                original = model.get_submodule(key).parametrizations.weight.original
                gradient, weight = masked.weight.grad, original
                if not isinstance(masked, nn.Linear):
                    gradient, weight = gradient.T, weight.T
                naive[-1] += (gradient * weight)[place].sum().item()
        found = group.learned.grad
        if not isinstance(masked, nn.Linear) and structure == "4x2":
            found = found.permute(2, 3, 0, 1)  # a Conv1D's stand by input
        torch.testing.assert_close(found.flatten(), torch.tensor(naive, dtype=torch.double))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("score", ["magnitude", "movement"])
def test_a_pattern_has_its_number_in_every_run(name: str, score: Any) -> None:
    """Prevents runs along the outputs, which no hardware reads, and patterns that a falling density breaks up."""
    model = tiny(name)
    method = attached(model, "2:4", score)
    weights = {
        key: (group.learned if score == "movement" else group.modules[key].weight.abs()).detach().clone()
        for group in method.groups
        for key in group.modules
    }
    seen = {}
    for progress in (0.5, 1.0):
        method.step(progress)
        seen[progress] = masks(model, method)
        assert method.metrics()["density_2:4"] == pytest.approx(method.schedule.at(progress), abs=2e-3)
    for key, mask in seen[1.0].items():
        module = model.get_submodule(key)
        scores = weights[key].reshape(module.weight.shape)
        scores = scores if isinstance(module, nn.Linear) else scores.T
        for row, of_row in zip(mask, scores, strict=True):
            for start in range(0, len(row), 4):
                best = of_row[start : start + 4].topk(2).indices.tolist()
                assert row[start : start + 4].nonzero().flatten().tolist() == sorted(best)
        assert not (mask & ~seen[0.5][key]).any()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("structure", ["rows", "4x2", "heads", "ffn", "columns", "weights"])
def test_a_bias_goes_with_the_last_of_its_row(name: str, structure: str) -> None:
    """Prevents heads and dimensions that are gone but for a constant, and biases lost where columns go."""
    model = tiny(name)
    method = attached(model, structure, ranking="global")
    if structure == "4x2":
        with torch.no_grad():
            for group in method.groups:
                group.learned.sub_(10 * (torch.rand(group.learned.shape[0], 1, 1, 1) < 0.5))
    method.step(1.0)
    for key, mask in masks(model, method).items():
        module = model.get_submodule(key)
        if module.bias is None:
            continue
        gone = ~mask.any(1) if structure != "weights" else torch.zeros(len(mask)).bool()
        assert torch.equal(module.bias == 0, gone), key


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("score", ["movement", "soft_movement", "magnitude", "random"])
def test_heads_and_dimensions_are_pruned_in_one_run_and_removed(name: str, score: Any, tmp_path: Any) -> None:
    """Prevents masks that shrinking cannot see, and a small model that computes otherwise than what was trained."""
    model = tiny(name)
    methods = [
        Pruning(CubicSchedule(density, 0.1, 0.3), score, structure=structure, ranking="tensor")
        for structure, density in (("heads", 0.5), ("ffn", 1 / 3))
    ]
    train(model, methods)
    trained = model(**BATCH).logits
    names = bake(model)
    assert torch.equal(model(**BATCH).logits, trained)
    small = shrink(model)
    assert [(layer.heads.count, layer.ffn.count) for layer in dissect(small)] == [(2, 8), (2, 8)]
    torch.testing.assert_close(small(**BATCH).logits, trained, rtol=0, atol=1e-5)
    assert len([name for name in names if name.endswith("weight")]) == 2 * sum(
        len(units.producers) + 1 for units in (dissect(small)[0].heads, dissect(small)[0].ffn)
    )


def train(model: PreTrainedModel, methods: list[Pruning], steps: int = 8) -> None:
    for method in methods:
        method.attach(model)
        method.start(steps)
        method.step(0.0)
    groups = [group for method in methods for group in method.parameter_groups()]
    apart = {id(parameter) for group in groups for parameter in group["params"]}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    optimizer = torch.optim.AdamW([{"params": weights}, *groups], lr=1e-2)
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(**BATCH).logits, LABELS)
        optimizer.zero_grad()
        (loss + sum(method.penalty() for method in methods)).backward()
        optimizer.step()
        for method in methods:
            method.check_gradients()
            method.step((step + 1) / steps)
    for method in methods:
        method.finish()


def test_scores_that_weights_share_are_saved_once(tmp_path: Any) -> None:
    """Prevents a checkpoint that safetensors refuses, and scores that part when one is loaded."""
    model = tiny()
    attached(model, "heads")
    keys = [key for key in model.state_dict() if key.endswith("scores")]
    assert len(keys) == 2
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(model)
    for layer in again.bert.encoder.layer:
        masks = [module for module in layer.modules() if isinstance(module, LearnedMask)]
        assert len({id(mask.scores) for mask in masks}) == 1
        assert len(masks) == 4


def test_of_several_structures_each_takes_what_is_left() -> None:
    """Prevents a matrix that two structures mask, or none."""
    model = tiny()
    ffn, blocks = (Pruning(CubicSchedule(0.5), structure=structure) for structure in ("ffn", "4x4"))
    ffn.attach(model)
    blocks.attach(model)
    assert sorted([*ffn.masks, *blocks.masks]) == sorted({*ffn.masks, *blocks.masks})
    assert len(ffn.masks) + len(blocks.masks) == 2 * 6
    assert all("attention" in name for name in blocks.masks)
    with pytest.raises(InputError, match="all 12 modules carry masks already: nothing is left for heads"):
        Pruning(CubicSchedule(0.5), structure="heads").attach(model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"structure": "head"},
            "no structure head: give weights, rows, columns, heads, ffn, layers, blocks",
        ),
        ({"structure": "0x4"}, "no structure 0x4"),
        ({"structure": "4:4"}, "no structure 4:4"),
        ({"structure": "32x32"}, r"32x32 does not divide \S*query, which has 16 outputs and 16 inputs"),
        ({"structure": "2:5"}, r"2:5 does not divide \S*query"),
        ({"structure": "1:4"}, r"1:4 keeps a density of 0\.25, and 0\.4 was asked for"),
        ({"structure": "heads", "patterns": ["*.intermediate.*"]}, "none of the modules to prune makes or reads heads"),
        ({"structure": "heads", "excluded": ["*.query"]}, r"heads of \S*layer\.0 lie in 4 modules, of which \S*query"),
        ({"structure": "heads", "density": 0.1}, r"a density of 0\.1 keeps none of \S*layer\.0 heads, 4 in number"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused(options: dict[str, Any], expected: str) -> None:
    """Prevents blocks that leave an edge of each matrix dense, and heads that are pruned in half."""
    options = dict(options)
    schedule = CubicSchedule(options.pop("density", 0.4))
    if options["structure"] == "2:5":
        schedule = CubicSchedule(0.4)
    with pytest.raises(InputError, match=expected):
        Pruning(schedule, **options).attach(tiny())


@pytest.mark.parametrize("structure", ["weights", "4x2", "rows", "columns", "2:4", "heads", "ffn"])
@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_a_run_sees_for_itself_what_became_of_its_masks(name: str, structure: str) -> None:
    """Prevents a model of another density, or of masks that differ between matrices, from passing for a pruned one."""
    model = tiny(name)
    method = attached(model, structure)
    method.step(1.0)
    method.finish()
    group = method.groups[0]
    first, *others = group.masks.values()
    good = first.mask.clone()

    first.mask.zero_()
    group.keep(group.kept)
    with pytest.raises(RuntimeError, match=r"the run ended with 0 of|in every run"):
        method.finish()
    group.keep(good.flatten() > 0)
    method.finish()

    if others:
        others[-1].mask.copy_(1 - others[-1].mask)
        with pytest.raises(RuntimeError, match="is not masked as"):
            method.finish()
    if structure == "2:4":
        group.keep(good.roll(1).flatten() > 0)  # as many as before, but elsewhere
        with pytest.raises(RuntimeError, match=r"does not have .* in every run"):
            method.finish()
    if structure in ("rows", "heads", "ffn"):
        group.keep(good.flatten() > 0)
        bias = next(module for module in model.modules() if hasattr(module, "parametrizations")).parametrizations.bias
        bias[0].mask.fill_(1)
        with pytest.raises(RuntimeError, match="has biases in rows that are gone"):
            method.finish()
    bake(next(iter(group.modules.values())))
    with pytest.raises(RuntimeError, match=r"1 of [0-9]+ modules have lost their masks"):
        method.finish()


@pytest.mark.parametrize("structure", ["4x2", "rows", "heads", "ffn"])
def test_units_without_a_gradient_are_named(structure: str) -> None:
    """Prevents scores that nothing teaches from being taken for learned ones."""
    model = tiny()
    method = attached(model, structure)
    model.bert.embeddings(BATCH["input_ids"]).sum().backward()
    with pytest.raises(InputError, match=r"the scores of bert\.encoder\.layer\.0.* get no gradient"):
        method.check_gradients()
