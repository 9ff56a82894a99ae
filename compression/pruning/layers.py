"""Whole layers: switched off while the model trains, then taken out."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from prunelle.compression.layers import find_layers
from prunelle.compression.pruning.structures import Axis, Layout, UnitGroup
from prunelle.compression.student import student_from_layers
from prunelle.errors import InputError

NAME = "layer_gates"


class LayerGates(nn.Module):
    """A gate for each layer of a stack: 1 lets the layer work, 0 hands on what it was given.

    Attributes:
        weight: (layers, 1), all 1. Masks lie on it, and nothing else is to change it.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        example = next(layers.parameters())
        self.weight = nn.Parameter(torch.ones(len(layers), 1, dtype=example.dtype, device=example.device))
        for number, layer in enumerate(layers):
            layer.register_forward_hook(_Gate(self, number), with_kwargs=True)


@dataclass
class _Gate:
    """The hook on one layer."""

    gates: LayerGates
    number: int

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The first argument and the first output are hidden states, (batch, length, width)."""
        given = args[0] if args else kwargs["hidden_states"]
        made, *rest = output if isinstance(output, tuple) else (output,)
        gate = self.gates.weight[self.number].to(made.dtype)
        passed = torch.lerp(given, made, gate)  # exactly the one or the other at 0 and 1
        return (passed, *rest) if isinstance(output, tuple) else passed


def gate_layers(model: PreTrainedModel, pruned: Sequence[int] = ()) -> UnitGroup:
    """Puts gates on a model's layers, in place; they are its units.

    Args:
        model: with one stack of layers. What else it is to carry comes later.
        pruned: the layers that go first, counted from 0, whatever their scores.

    Raises:
        InputError: the layers are not found, there is only one, one to prune does not exist, or without it those after
            it would compute something else; or the model carries masks already.
    """
    stack = find_layers(model)
    depth = len(stack.modules)
    if any(map(is_parametrized, model.modules())):
        raise InputError("the model carries masks or quantizers: gate the layers first")
    if depth < 2:
        raise InputError(f"{type(model).__name__} has a single layer, which has to stay")
    if unknown := [layer for layer in pruned if not 0 <= layer < depth]:
        raise InputError(f"there is no layer {unknown[0]} to prune: there are 0 to {depth - 1}")
    parent, _, _ = stack.name.rpartition(".")
    offsets = torch.zeros(depth)
    offsets[list(pruned)] = -torch.inf
    try:
        if getattr(model.get_submodule(parent), "conv", None) is not None:  # DeBERTa-v2's, after whichever comes first
            raise InputError(f"{type(model).__name__} has a convolution that belongs to its first layer: keep layer 0")
        student_from_layers(model, range(1, depth))
    except InputError:
        if 0 in pruned:
            raise
        student_from_layers(model, [0, *range(2, depth)])  # as ModernBERT's, the first has to stay; or none can go
        offsets[0] = torch.inf
    gates = LayerGates(stack.modules)
    model.get_submodule(parent).add_module(NAME, gates)
    layout = Layout((Axis(depth, True),), (Axis(1, False),), is_transposed=False)
    offsets = offsets.to(gates.weight.device)  # once: a GPU would be waited for at every ranking
    return UnitGroup("the layers", {f"{parent}.{NAME}".lstrip("."): layout}, offsets=offsets)


def kept_layers(model: nn.Module) -> list[int] | None:
    """The layers whose gates are open, counted from 0; None of a model without gates."""
    found = [module for module in model.modules() if isinstance(module, LayerGates)]
    return found[0].weight.flatten().nonzero().flatten().tolist() if found else None


def remove_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a copy of a model without gates, and without the layers that its gates have switched off.

    Args:
        model: with masks baked in; it is left as it is.

    Returns:
        A model of the same class, in the same mode, which computes the same: stock `from_pretrained` loads it.
    """
    kept = kept_layers(model)
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if hasattr(module, NAME):
            delattr(module, NAME)
    return copied if kept is None else student_from_layers(copied, kept).train(model.training)
