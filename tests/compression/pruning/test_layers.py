"""Whole layers: switched off by learned scores or by name, and taken out."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression import bake, find_layers, student_from_layers
from prunelle.compression.anatomy import dissect
from prunelle.compression.pruning import CubicSchedule, Pruning, kept_layers, remove_layers, shrink
from prunelle.errors import InputError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "num_labels": 3,
}
OTHER_NAMES = {"vocab_size": 40, "pad_token_id": 1, "num_labels": 3}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "DistilBert": {**OTHER_NAMES, "dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 4},
    "ModernBert": {**SIZES, **SPECIAL, "local_attention": 4, "global_attn_every_n_layers": 3},
    "GPT2": {**OTHER_NAMES, "n_positions": 32, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_inner": 24},
    "Electra": {**SIZES, "embedding_size": 8},
    "MPNet": SIZES,
    "DebertaV2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3},
}
BATCH = {"input_ids": torch.arange(4, 28).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
LABELS = torch.tensor([0, 2])


def tiny(name: str = "Bert", **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}ForSequenceClassification")
    model = model_class(model_class.config_class(**CONFIGS[name] | config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def loss(model: PreTrainedModel) -> Tensor:
    return nn.functional.cross_entropy(model(**BATCH).logits, LABELS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_that_is_off_is_as_if_it_were_not_there(name: str, tmp_path: Any) -> None:
    """Prevents a layer that still norms, and a checkpoint that needs this package for nothing."""
    model = tiny(name)
    dense, expected = model(**BATCH).logits, student_from_layers(model, [0, 2])(**BATCH).logits
    method = Pruning(CubicSchedule(0.9), structure="layers", pruned_layers=[1, 3])
    method.attach(model)
    assert torch.equal(model(**BATCH).logits, dense)
    method.step(1.0)
    method.finish()
    torch.testing.assert_close(model(**BATCH).logits, expected)
    bake(model)
    assert kept_layers(model) == [0, 2]
    small = remove_layers(model)
    torch.testing.assert_close(small(**BATCH).logits, expected)
    small.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(find_layers(loaded).modules) == 2
    torch.testing.assert_close(loaded(**BATCH).logits, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gate_learns_what_its_layer_is_worth(name: str) -> None:
    """Prevents layers that go by their number: a score gets the gradient of a layer being there."""
    model = tiny(name).double()
    method = Pruning(CubicSchedule(0.5), structure="layers", score="movement")
    method.attach(model)
    loss(model).backward()
    (group,) = method.groups
    gates = model.get_submodule(next(iter(group.modules)))
    for layer in range(4):
        losses = []
        for change in (1e-4, -1e-4):
            with torch.no_grad():
                gates.parametrizations.weight.original[layer] += change
                losses.append(loss(model).item())
                gates.parametrizations.weight.original[layer] -= change
        slope = (losses[0] - losses[1]) / 2e-4
        assert group.learned.grad[layer].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_heads_and_dimensions_go_in_one_run(name: str) -> None:
    """Prevents gates that training moves off 1, a density beside the one asked for, and a lost first layer."""
    model = tiny(name)
    densities = {"layers": 0.5, "heads": 0.5, "ffn": 1 / 3}
    methods = [Pruning(CubicSchedule(density, 0.1, 0.3), structure=name) for name, density in densities.items()]
    for method in methods:
        method.attach(model)
        method.step(0.0)
    groups = [group for method in methods for group in method.parameter_groups()]
    apart = {id(parameter) for group in groups for parameter in group["params"]}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    optimizer = torch.optim.AdamW([{"params": weights}, *groups], lr=1e-2)
    for step in range(8):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        for method in methods:
            method.step((step + 1) / 8)
    for method in methods:
        method.finish()
    trained = model(**BATCH).logits
    bake(model)
    kept = kept_layers(model)
    assert kept is not None
    assert len(kept) == 2
    assert name not in ("ModernBert", "DebertaV2") or kept[0] == 0
    small = shrink(remove_layers(model))
    assert [(layer.heads.count, layer.ffn.count) for layer in dissect(small)] == [(1, 8)] * 2
    torch.testing.assert_close(small(**BATCH).logits, trained, rtol=0, atol=1e-5)
    assert kept_layers(small) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_layer_goes_where_the_others_compute_the_same_without_it(name: str) -> None:
    """Prevents what an encoder does after its first layer from moving behind the second once the first is out."""
    model = tiny(name)
    method = Pruning(CubicSchedule(0.5, 0.0, 0.0), structure="layers")
    method.attach(model)
    with torch.no_grad():
        method.groups[0].learned.copy_(torch.tensor([-1.0, 0.1, 0.2, 0.3])[:, None])
    method.step(1.0)
    assert kept_layers(model) == ([0, 3] if name in ("ModernBert", "DebertaV2") else [2, 3])
    expected = model(**BATCH).logits
    bake(model)
    torch.testing.assert_close(remove_layers(model)(**BATCH).logits, expected)


def test_scores_decide_which_layers_go() -> None:
    """Prevents ties that keep the first layers whatever has been learned."""
    model = tiny()
    method = Pruning(CubicSchedule(0.5, 0.0, 0.0), structure="layers")
    method.attach(model)
    with torch.no_grad():
        method.groups[0].learned.copy_(torch.tensor([0.1, 0.4, -0.2, 0.3])[:, None])
    again = copy.deepcopy(model)
    method.step(1.0)
    assert kept_layers(model) == [1, 3]
    assert kept_layers(again) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "options", "config", "expected"),
    [
        ("Bert", {"pruned_layers": [4]}, {}, "there is no layer 4 to prune: there are 0 to 3"),
        ("Bert", {}, {"num_hidden_layers": 1}, "BertForSequenceClassification has a single layer"),
        ("Bert", {"score": "magnitude"}, {}, "layers have no magnitude"),
        ("Bert", {"score": "wanda", "pruned_layers": [1]}, {}, "layers have no inputs that wanda could measure"),
        ("Bert", {"density": 0.1}, {}, r"a density of 0\.1 keeps none of 4 layers: give 0\.25 at least"),
        ("Bert", {"density": 0.1, "score": "l0"}, {}, r"a density of 0\.1 keeps none of 4 layers"),
        ("Bert", {"pruned_layers": [0, 1, 2, 3]}, {}, r"a density of 0\.0 must be above 0"),
        ("ModernBert", {"pruned_layers": [0]}, {}, "keep layer 0, as the first"),
        ("DebertaV2", {"pruned_layers": [0]}, {}, "a convolution that belongs to its first layer: keep layer 0"),
    ],
)
def test_what_cannot_go_is_refused(name: str, options: Any, config: Any, expected: str) -> None:
    """Prevents a run whose result cannot be built, or that prunes nothing."""
    options = {"density": 0.5} | options
    with pytest.raises(InputError, match=expected):
        Pruning(CubicSchedule(options.pop("density")), structure="layers", **options).attach(tiny(name, **config))


def test_layers_are_gated_before_anything_else() -> None:
    """Prevents a probe of what may go from failing on masks with a message about students."""
    model = tiny()
    Pruning(CubicSchedule(0.5), structure="heads").attach(model)
    with pytest.raises(InputError, match="gate the layers first"):
        Pruning(CubicSchedule(0.5), structure="layers").attach(model)
