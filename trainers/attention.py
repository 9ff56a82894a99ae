"""Queries, keys and values of any attention: caught where they leave their linear maps.

So no model has to be switched to eager attention for a loss on them; and what is caught is what the model computes,
without a second forward.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression import find_layers
from prunelle.errors import InputError

# What the linear maps are called, within whatever module of a layer holds them: three, or one whose output is the
# three side by side. (Some models name one map `query_key_value` and interleave the heads: not among these.)
SEPARATE = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
FUSED = ("Wqkv", "c_attn")


@dataclass(frozen=True)
class Vectors:
    """Queries, keys and values of one layer: (batch, tokens, size) each, not yet split into heads."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class SelfAttention:
    """The self-attention of one layer.

    Args:
        maps: the linear maps to queries, keys and values; or one to all three.
        sizes: of a token's queries, keys and values, all heads together.
        heads: how many heads the layer splits them into.
        causal: whether tokens see only themselves and those before them.
    """

    maps: tuple[Any, ...]
    sizes: tuple[int, int, int]
    heads: int
    causal: bool

    def vectors(self, outputs: tuple[Tensor, ...]) -> Vectors:
        """The outputs of the maps as queries, keys and values."""
        return Vectors(*(outputs if len(outputs) == 3 else outputs[0].split(self.sizes, dim=-1)))


def find_attention(model: PreTrainedModel) -> list[SelfAttention]:
    """The self-attention of each layer, in the order of computation.

    Raises:
        InputError: The model has no one list of layers, or a layer without exactly one attention whose maps to
            queries, keys and values are known by name.
    """
    found = []
    for number, layer in enumerate(find_layers(model).modules):
        candidates = [
            (module, names)
            for module in layer.modules()
            for names in (*SEPARATE, *((name,) for name in FUSED))
            if all(isinstance(getattr(module, name, None), nn.Module) for name in names)
        ]
        if len(candidates) != 1:
            raise InputError(
                f"layer {number} of {type(model).__name__} has {len(candidates) or 'no'} modules with linear maps "
                f"called {', '.join('/'.join(names) for names in SEPARATE)} or {', '.join(FUSED)}: exactly one is "
                "needed to compare attention or relations"
            )
        ((module, names),) = candidates
        maps = tuple(getattr(module, name) for name in names)
        # GPT-2's maps are `Conv1D`, which calls the size of its output nf.
        widths = [linear.nf if hasattr(linear, "nf") else linear.out_features for linear in maps]
        query, key, value = widths if len(widths) == 3 else (widths[0] // 3,) * 3
        heads = model.config.num_attention_heads
        found.append(SelfAttention(maps, (query, key, value), heads, bool(getattr(module, "is_causal", False))))
    return found


@contextmanager
def catch(attentions: Mapping[int, SelfAttention]) -> Iterator[dict[int, Vectors]]:
    """While the model runs, fill a dict with the queries, keys and values of the layers given.

    The hooks are gone afterwards, so that nothing of them is left in a model that is saved or exported.
    """
    outputs: dict[nn.Module, Tensor] = {}
    caught: dict[int, Vectors] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # The first call is the one on tokens: DeBERTa sends relative positions through the same map later.
        outputs.setdefault(module, output)

    hooks = [linear.register_forward_hook(keep) for attention in attentions.values() for linear in attention.maps]
    try:
        yield caught
        for layer, attention in attentions.items():
            caught[layer] = attention.vectors(tuple(outputs[linear] for linear in attention.maps))
    finally:
        for hook in hooks:
            hook.remove()


def attends_by_products(model: PreTrainedModel) -> bool:
    """Whether the model's attention is the softmax of queries times keys, over the root of a head's size.

    Rotary positions and biases of relative positions are added after the linear maps, so that what is caught there
    is not all that the attention is made of. No table of model names knows; four tokens tell.
    """
    attentions = dict(enumerate(find_attention(model)))
    tokens = torch.arange(4, device=model.device).unsqueeze(0)
    before, training = model.config._attn_implementation, model.training
    model.eval()
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), catch(attentions) as caught:
            reported = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), output_attentions=True)
    finally:
        model.set_attn_implementation(before)
        model.train(training)
    # Of the spread of the scores, not of probabilities: untrained heads attend to all tokens nearly alike.
    tolerance = 0.05 + 10 * torch.finfo(model.dtype).eps
    for layer, attention in attentions.items():
        queries, keys = (_split(x, attention.heads) for x in (caught[layer].query, caught[layer].key))
        if queries.shape != keys.shape:
            return False
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        seen = torch.ones_like(scores).tril().bool() if attention.causal else torch.ones_like(scores).bool()
        expected = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
        compared = seen & (expected > -10)
        errors = (expected - reported.attentions[layer].float().log())[compared].abs()
        if errors.max() > tolerance * scores[seen].std():
            return False
    return True


def _split(vectors: Tensor, heads: int) -> Tensor:
    return vectors.float().unflatten(-1, (heads, -1)).transpose(1, 2)
