"""Layers of a size of their own, which stock classes cannot build: how they are made and how they come back.

`config.layer_shapes` holds the sizes and goes with every checkpoint that the Trainer saves. A stock class that is
given such a checkpoint builds full layers and refuses the weights, whose shapes differ.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import MPNetModel, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelle.compression.anatomy import Layer, Linear, NoHeads, NoInputs, NoOutputs, Units, dissect
from prunelle.compression.norms import LAYER_NORM, NO_NORM, has_no_norms, leave_out_norms
from prunelle.errors import InputError

# What attentions call their number of heads, and the width of all of them.
_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_WIDTHS = ("all_head_size", "split_size")


def layer_shapes(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The sizes of each layer: `heads`, which of those it was made with are left, and `ffn`, how many dimensions."""
    shapes = getattr(model.config, "layer_shapes", None)
    if shapes is not None:
        return copy.deepcopy(shapes)
    return [{"heads": list(range(layer.heads.count)), "ffn": layer.ffn.count} for layer in dissect(model)]


def shaped_class(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that builds models of this configuration: the stock one where it says no `layer_shapes` and no NoNorms.

    Else one that goes by the stock class's name and makes the layers small once it has built them, before weights
    are loaded. What it builds may be given the stock class again: its modules are what differs.
    """
    if not needs_shaped_class(config.to_dict()):
        return model_class

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        if has_no_norms(config):
            leave_out_norms(self)
        if getattr(config, "layer_shapes", None) is not None:
            _make_room(self)

    names = {"__init__": __init__, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), names)


def needs_shaped_class(config: Mapping[str, Any]) -> bool:
    """Whether no stock class can load what a configuration, as it is written down, describes."""
    return config.get("layer_shapes") is not None or config.get(LAYER_NORM) == NO_NORM


def keep_units(
    model: PreTrainedModel, layer: Layer, heads: Sequence[int], ffn: Sequence[int], original_heads: Sequence[int]
) -> None:
    """Removes all heads and feed-forward dimensions of a layer but these, in place.

    Args:
        model: which the layer is a part of.
        layer: one of `dissect(model)`.
        heads: the heads to keep, counted among those that there are.
        ffn: the feed-forward dimensions to keep.
        original_heads: the same heads, counted among those the layer was made with.
    """
    _keep(model, layer.ffn, ffn)
    if not len(ffn):
        for name, producer in layer.ffn.producers.items():
            model.set_submodule(name, NoOutputs(producer))

    attention = model.get_submodule(layer.attention)
    if isinstance(attention, NoHeads):
        return
    _keep(model, layer.heads, heads)
    if not len(heads):
        name, _ = layer.heads.consumer
        inside = name.removeprefix(f"{layer.attention}.")
        output = None if inside == name else (inside, model.get_submodule(name))
        model.set_submodule(layer.attention, NoHeads(attention, layer.heads.size, output))
        return
    for attributes, value in ((_COUNTS, len(heads)), (_WIDTHS, len(heads) * layer.heads.size)):
        for attribute in attributes:
            if hasattr(attention, attribute):
                setattr(attention, attribute, value)
    if isinstance(model.base_model, MPNetModel):
        _select_position_bias(attention, original_heads)


def _make_room(model: PreTrainedModel) -> None:
    """Cuts the layers of a new model to the shapes in its configuration, whatever is in them."""
    layers, shapes = dissect(model), model.config.layer_shapes
    if len(layers) != len(shapes):
        raise InputError(f"config.layer_shapes has {len(shapes)} entries for {len(layers)} layers")
    for layer, shape in zip(layers, shapes, strict=True):
        keep_units(model, layer, range(len(shape["heads"])), range(shape["ffn"]), shape["heads"])


def _keep(model: PreTrainedModel, units: Units, kept: Sequence[int]) -> None:
    name, consumer = units.consumer
    if isinstance(consumer, NoInputs):
        return
    outputs, inputs = units.outputs(kept), units.inputs(kept)
    for producer in units.producers.values():
        _cut(producer, "outputs", outputs)
    if len(kept):
        _cut(consumer, "inputs", inputs)
    else:
        model.set_submodule(name, NoInputs(consumer))


def _cut(linear: Linear, side: Literal["outputs", "inputs"], kept: Tensor) -> None:
    is_first = (side == "outputs") == isinstance(linear, nn.Linear)
    linear.weight = _selected(linear.weight, 0 if is_first else 1, kept)
    if side == "outputs" and linear.bias is not None:
        linear.bias = _selected(linear.bias, 0, kept)
    width = {"outputs": ("out_features", "nf"), "inputs": ("in_features", "nx")}[side][isinstance(linear, Conv1D)]
    setattr(linear, width, len(kept))


def _selected(parameter: Any, dim: int, kept: Tensor) -> nn.Parameter:
    chosen = parameter.detach().index_select(dim, kept.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


@dataclass
class _HeadsOfPositionBias:
    """MPNet's encoder gives each layer a bias for every head of the first: those of the layer's own are taken."""

    heads: list[int]

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The third argument is the bias, (batch, all heads, length, length)."""
        hidden_states, mask, bias, *rest = args
        return (hidden_states, mask, bias if bias is None else bias[:, self.heads], *rest), kwargs


def _select_position_bias(attention: nn.Module, heads: Sequence[int]) -> None:
    for hook in attention._forward_pre_hooks.values():
        if isinstance(hook, _HeadsOfPositionBias):
            hook.heads = list(heads)
            return
    attention.register_forward_pre_hook(_HeadsOfPositionBias(list(heads)), with_kwargs=True)
