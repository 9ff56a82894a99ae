"""What a transformer's layer can do without, piece by piece: attention heads and feed-forward dimensions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelle.compression.layers import find_layers
from prunelle.errors import InputError

Linear: TypeAlias = nn.Linear | Conv1D


@dataclass(frozen=True)
class Units:
    """The attention heads of a layer, or the dimensions of its feed-forward network.

    Each unit is a run of `size` outputs of every producer, and the same run of the consumer's inputs.

    Args:
        producers: qualified names in the model, and modules: queries, keys and values, or the FFN's first matrix.
        parts: how many projections a producer holds, one after the other: 3 where queries, keys and values are
            fused, 2 in a gated FFN (what is activated, then the gate), else 1.
        consumer: name and module that reads what the units give: the output projection, or the FFN's second matrix.
        size: outputs of one unit in one projection: the size of a head, or 1.
    """

    producers: dict[str, Linear]
    parts: int
    consumer: tuple[str, Any]
    size: int

    @property
    def count(self) -> int:
        """How many units there are."""
        return matrix(self.consumer[1]).shape[1] // self.size

    def inputs(self, kept: Sequence[int]) -> Tensor:
        """The consumer's inputs that these units feed: (len(kept) * size,) int64."""
        places = torch.arange(self.count * self.size).view(self.count, self.size)
        return places[torch.tensor(kept, dtype=torch.int64)].flatten()

    def outputs(self, kept: Sequence[int]) -> Tensor:
        """The outputs of each producer that make these units: (parts * len(kept) * size,) int64."""
        places = torch.arange(self.parts * self.count * self.size).view(self.parts, self.count, self.size)
        return places[:, torch.tensor(kept, dtype=torch.int64)].flatten()


@dataclass(frozen=True)
class Layer:
    """One layer, by its parts.

    Args:
        name: qualified name in the model.
        module: the layer itself.
        attention: qualified name of the module that splits its input into heads.
        heads: its attention heads.
        values: name of the producer that makes the heads' values; the last of its parts does.
        ffn: the dimensions of its feed-forward network.
        activation: what the FFN applies between its two matrices.
        norms_first: whether each half of the layer adds to what runs through the model and norms nothing else.
    """

    name: str
    module: nn.Module
    attention: str
    heads: Units
    values: str
    ffn: Units
    activation: Callable[[Tensor], Tensor]
    norms_first: bool


class NoHeads(nn.Module):
    """Stands for an attention none of whose heads is left: its output projection sees nothing.

    Args:
        attention: what it replaces.
        head_size: of the heads that there were.
        output: name and module of the output projection where it is a part of the attention.
    """

    def __init__(self, attention: nn.Module, head_size: int, output: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.attention_head_size = head_size
        self.layer_idx = getattr(attention, "layer_idx", None)
        self.output_name = None if output is None else output[0]
        if output is not None:
            self.add_module(*output)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """hidden_states: (batch, length, width). Returns (batch, length, width or 0), and no probabilities."""
        for value in (*args, *kwargs.values()):
            if hasattr(value, "get_seq_length"):  # a cache knows how long the text is by what its layers hold
                placeholder = hidden_states[:, None, :, :1]
                value.update(placeholder, placeholder, self.layer_idx)
        context = hidden_states[..., :0]
        return context if self.output_name is None else self.get_submodule(self.output_name)(context), None


class NoOutputs(nn.Module):
    """Stands for a linear module none of whose outputs is left; its weight is (0, inputs)."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix(linear).detach()[:0].clone())
        self.bias = None

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: (..., inputs). Returns (..., 0)."""
        return vectors[..., :0]


class NoInputs(nn.Module):
    """Stands for a linear module none of whose inputs is left: its bias alone.

    Its weight, (0, outputs), stays in the checkpoint, so that a class that expects more of it refuses it.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix(linear).detach()[:, :0].T.contiguous())
        self.bias = linear.bias

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: (..., 0). Returns (..., outputs)."""
        nothing = vectors.new_zeros(*vectors.shape[:-1], self.weight.shape[1])
        return nothing if self.bias is None else nothing + self.bias


def dissect(model: PreTrainedModel) -> list[Layer]:
    """Finds heads and feed-forward dimensions of every layer.

    Args:
        model: BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT, MPNet, DeBERTa-v2, ModernBERT, GPT-2, or another
            model whose layers are built of parts with one of their sets of names.

    Raises:
        InputError: the layers are built otherwise.
    """
    stack = find_layers(model)
    return [_dissect(layer, f"{stack.name}.{place}") for place, layer in enumerate(stack.modules)]


def matrix(module: Any) -> Tensor:
    """The weight as (outputs, inputs), a view; GPT-2's Conv1D stores it the other way round."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T  # NoInputs as Conv1D


@dataclass(frozen=True)
class _Names:
    """What a family calls the parts of a layer."""

    attention: str
    queries_keys_values: tuple[str, ...]
    output: str
    up: str
    activation: str
    down: str
    fused: bool = False
    gated: bool = False
    norms_first: bool = False
    positions: tuple[str, ...] = ()  # projections of relative positions, split into heads too; not always there


_BERT = _Names(
    attention="attention.self",
    queries_keys_values=("attention.self.query", "attention.self.key", "attention.self.value"),
    output="attention.output.dense",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
)
_DEBERTA = _Names(
    attention="attention.self",
    queries_keys_values=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    output="attention.output.dense",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    positions=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
)
_MPNET = _Names(
    attention="attention.attn",
    queries_keys_values=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    output="attention.attn.o",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
)
_DISTILBERT = _Names(
    attention="attention",
    queries_keys_values=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    output="attention.out_lin",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
)
_MODERNBERT = _Names(
    attention="attn",
    queries_keys_values=("attn.Wqkv",),
    output="attn.Wo",
    up="mlp.Wi",
    activation="mlp.act",
    down="mlp.Wo",
    fused=True,
    gated=True,
    norms_first=True,
)
_GPT2 = _Names(
    attention="attn",
    queries_keys_values=("attn.c_attn",),
    output="attn.c_proj",
    up="mlp.c_fc",
    activation="mlp.act",
    down="mlp.c_proj",
    fused=True,
    norms_first=True,
)


def _dissect(layer: nn.Module, name: str) -> Layer:
    for names in (_BERT, _DEBERTA, _MPNET, _DISTILBERT, _MODERNBERT, _GPT2):
        if _fits(layer, names):
            return _by_names(layer, name, names)
    raise InputError(
        f"{name} ({type(layer).__name__}) is not built as a layer of BERT, DeBERTa-v2, MPNet, DistilBERT, ModernBERT "
        "or GPT-2: its heads and feed-forward dimensions are not known"
    )


def _fits(layer: nn.Module, names: _Names) -> bool:
    modules = dict(layer.named_modules())
    outside = (names.attention, names.output, names.up, names.down)
    if any(part not in modules for part in outside):
        return False
    if isinstance(modules[names.attention], NoHeads):
        return True
    known = (*names.queries_keys_values, names.output, *names.positions)
    # An attention with more projections than are known (Longformer's global ones) would be cut wrongly.
    own = [
        part
        for part, module in modules.items()
        if _within(part, names.attention) and ".parametrizations." not in part and [*module.parameters(False)]
    ]
    return all(part in modules for part in names.queries_keys_values) and set(own) <= set(known)


def _by_names(layer: nn.Module, name: str, names: _Names) -> Layer:
    modules = dict(layer.named_modules())
    attention = modules[names.attention]
    return Layer(
        name=name,
        module=layer,
        attention=f"{name}.{names.attention}",
        heads=Units(
            producers=_linears(modules, name, [*names.queries_keys_values, *names.positions]),
            parts=3 if names.fused else 1,
            consumer=(f"{name}.{names.output}", modules[names.output]),
            size=getattr(attention, "attention_head_size", None) or attention.head_dim,
        ),
        values=f"{name}.{names.queries_keys_values[-1]}",
        ffn=Units(
            producers=_linears(modules, name, [names.up]),
            parts=2 if names.gated else 1,
            consumer=(f"{name}.{names.down}", modules[names.down]),
            size=1,
        ),
        activation=layer.get_submodule(names.activation),
        norms_first=names.norms_first,
    )


def _linears(modules: dict[str, nn.Module], layer: str, parts: Sequence[str]) -> dict[str, Linear]:
    """Those that are there; in place of one without outputs stands a `NoOutputs`."""
    found = {f"{layer}.{part}": modules.get(part) for part in parts}
    return {name: module for name, module in found.items() if isinstance(module, Linear)}


def _within(part: str, whole: str) -> bool:
    return part.startswith(f"{whole}.")
