"""Queries, keys and values caught in passing are those that the model computes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, set_seed

from prunelle.compression import find_layers
from prunelle.errors import InputError
from prunelle.trainers.attention import attends_by_products, catch, find_attention

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "initializer_range": 0.5,
}
GPT2 = {
    "initializer_range": 0.5,
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "pad_token_id": 0,
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
SHARED_KEYS = DISENTANGLED | {"share_att_key": True}


def of(*path: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """A linear map of a layer, applied to the layer's input."""

    def apply(layer: nn.Module, hidden: Tensor) -> Tensor:
        return layer.get_submodule(".".join(path))(hidden)

    return apply


def fused(norm: str, linear: str, part: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def apply(layer: nn.Module, hidden: Tensor) -> Tensor:
        together = layer.get_submodule(linear)(layer.get_submodule(norm)(hidden))
        return together.view(*hidden.shape[:-1], 3, 4, 4).unbind(-3)[part].flatten(-2)

    return apply


BERT = {name: of("attention", "self", name) for name in ("query", "key", "value")}
# Model type, settings, whether its attention is queries times keys, and by hand its queries, keys and values.
MODELS: dict[str, tuple[str, dict[str, Any], bool, dict[str, Callable[[nn.Module, Tensor], Tensor]]]] = {
    "bert": ("bert", SIZES, True, BERT),
    "roberta": ("roberta", SIZES | {"pad_token_id": 1}, True, BERT),
    "electra": ("electra", SIZES | {"embedding_size": 8}, True, BERT),
    "distilbert": (
        "distilbert",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "initializer_range": 0.5},
        True,
        {name: of("attention", f"{name[0]}_lin") for name in ("query", "key", "value")},
    ),
    "gpt2": (
        "gpt2",
        GPT2,
        True,
        {name: fused("ln_1", "attn.c_attn", part) for part, name in enumerate(("query", "key", "value"))},
    ),
    "gpt2, scaled by layer": (
        "gpt2",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True},
        False,
        {name: fused("ln_1", "attn.c_attn", part) for part, name in enumerate(("query", "key", "value"))},
    ),
    "mpnet": (
        "mpnet",
        SIZES,
        False,
        {name: of("attention", "attn", name[0]) for name in ("query", "key", "value")},
    ),
    "deberta-v2": (
        "deberta-v2",
        SIZES | DISENTANGLED,
        False,
        {name: of("attention", "self", f"{name}_proj") for name in ("query", "key", "value")},
    ),
    "deberta-v2, positions through the same maps": (
        "deberta-v2",
        SIZES | SHARED_KEYS,
        False,
        {name: of("attention", "self", f"{name}_proj") for name in ("query", "key", "value")},
    ),
    "modernbert": (
        "modernbert",
        SIZES | {"pad_token_id": 0, "global_attn_every_n_layers": 1},
        False,
        {name: fused("attn_norm", "attn.Wqkv", part) for part, name in enumerate(("query", "key", "value"))},
    ),
}


def build(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    set_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **settings)).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    words = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_caught_is_what_the_layer_computes(name: str, batch: dict[str, Tensor]) -> None:
    """Prevents heads that are mixed up in a fused map, another layer's vectors, and DeBERTa's positions for words."""
    model_type, settings, _, by_hand = MODELS[name]
    model = build(model_type, settings)
    attention = find_attention(model)
    with torch.no_grad(), catch(dict(enumerate(attention))) as caught:
        hidden = model(**batch, output_hidden_states=True).hidden_states
    assert list(caught) == [0, 1]
    for number, layer in enumerate(find_layers(model).modules):
        for vectors, compute in by_hand.items():
            torch.testing.assert_close(getattr(caught[number], vectors), compute(layer, hidden[number]))
    assert not any(module._forward_hooks for module in attention[0].maps)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "gpt2"])
def test_attention_is_what_an_eager_model_reports(name: str, batch: dict[str, Tensor]) -> None:
    """Prevents a loss on attention maps that the model does not have, for the sake of SDPA."""
    model = build(*MODELS[name][:2])
    assert model.config._attn_implementation == "sdpa"
    attention = find_attention(model)
    with torch.no_grad(), catch(dict(enumerate(attention))) as caught:
        model(**batch)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        reported = model(**batch, output_attentions=True).attentions
    for number, layer in enumerate(attention):
        query, key = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in (caught[number].query, caught[number].key))
        scores = query @ key.transpose(-1, -2) / math.sqrt(4)
        if layer.causal:
            scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), reported[number])


@pytest.mark.parametrize("spread", [1.0, 0.04], ids=["trained", "fresh"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_that_is_more_than_products_is_noticed(name: str, spread: float) -> None:
    """Prevents attention maps without the positions that the model adds; in fresh models too, which see all alike."""
    model_type, settings, expected, _ = MODELS[name]
    model = build(model_type, settings | {"initializer_range": 0.5 * spread}).train()
    before = model.config._attn_implementation
    assert attends_by_products(model) is expected
    assert model.training
    assert model.config._attn_implementation == before


def test_layers_that_are_shared_are_refused() -> None:
    """Prevents one layer's vectors from standing for all."""
    albert = build("albert", SIZES | {"embedding_size": 8})
    with pytest.raises(InputError, match="layers"):
        find_attention(albert)
