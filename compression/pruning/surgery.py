"""Takes out of a pruned model what no longer does anything: heads, feed-forward dimensions, whole layers.

A masked model has as many numbers as before and is as slow. What comes out here computes the same with smaller
matrices, each layer of its own size.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from prunelle.compression.anatomy import Layer, Units, dissect, matrix
from prunelle.compression.shapes import keep_units, layer_shapes
from prunelle.compression.student import student_from_layers
from prunelle.errors import InputError


@torch.no_grad()
def shrink(model: PreTrainedModel, round_to: int = 8) -> PreTrainedModel:
    """Makes a smaller copy of a model with zeros in it, which computes the same.

    A head or a feed-forward dimension goes where it cannot change the outcome at any attended token: where nothing
    of it is read, or where it is the same for every text. (A head whose values are zero gives its bias, a dimension
    with no weights the activation of its bias; what such a constant adds is added to the next bias.) Layers that only
    add nothing go as a whole where the architecture norms first (GPT-2, ModernBERT). Elsewhere a layer with nothing
    left in it still norms, and so stays, as its norms and biases.

    Args:
        model: with zeros where it was pruned, masks baked in; it is left as it is. Any architecture that `dissect`
            knows; it may have been shrunk before.
        round_to: feed-forward dimensions that are left are a multiple of this, as hardware likes; of those that
            could go, the ones with the largest weights stay to fill it up. 1 removes all that can go.

    Returns:
        A model of the same class, on the same device, in the same dtype and mode, which shares no tensor with the
        first. Its `config.layer_shapes` has an entry for each layer: `heads`, which of the original ones are left,
        and `ffn`, how many dimensions. A model with nothing to remove comes back as a plain copy.

    Raises:
        InputError: the model carries masks or quantizers, its layers are built in no known way, or `round_to` is
            not positive.
    """
    if round_to < 1:
        raise InputError(f"round_to is {round_to}: it must be at least 1")
    for name, module in model.named_modules():
        if is_parametrized(module):
            raise InputError(f"{name} carries a mask or a quantizer; bake the model first")
    small = _without_idle_layers(model)
    before, shapes = layer_shapes(small), layer_shapes(small)
    for layer, shape in zip(dissect(small), shapes, strict=True):
        heads = _without(layer.heads, _idle_heads(layer), round_to=1)
        ffn = _without(layer.ffn, _idle_dimensions(layer), round_to)
        shape |= {"heads": [shape["heads"][head] for head in heads], "ffn": len(ffn)}
        keep_units(small, layer, heads, ffn, shape["heads"])
    if shapes != before:
        small.config.layer_shapes = shapes
    return small


def _without_idle_layers(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model without the layers that hand on what they are given."""
    layers = dissect(model)
    working = [place for place, layer in enumerate(layers) if not _is_idle(layer)] or [0]
    if len(working) < len(layers):
        try:
            return student_from_layers(model, working).train(model.training)
        except InputError:  # a layer would compute something else at its new place; the idle ones stay, empty
            pass
    return copy.deepcopy(model)


def _is_idle(layer: Layer) -> bool:
    """Whether the layer's two halves add nothing, to a sum that no norm lies on."""
    if not layer.norms_first:
        return False
    heads, ffn = _idle_heads(layer), _idle_dimensions(layer)
    return bool(
        heads.places.all()
        and ffn.places.all()
        and not any(idle.added(units).any() for idle, units in ((heads, layer.heads), (ffn, layer.ffn)))
    )


@dataclass(frozen=True)
class _Idle:
    """Which units cannot change the outcome.

    Args:
        places: (units,) bool.
        constants: (units, size) what each of them gives, whatever the text.
    """

    places: Tensor
    constants: Tensor

    def added(self, units: Units, gone: Tensor | None = None) -> Tensor:
        """(width,) what the consumer's bias is once it stands for these units too, all idle ones by default."""
        _, consumer = units.consumer
        gone = self.places if gone is None else gone
        added = matrix(consumer) @ (self.constants * gone[:, None]).flatten()
        return added if consumer.bias is None else consumer.bias + added


def _idle_heads(layer: Layer) -> _Idle:
    units = layer.heads
    if not units.count:
        return _nothing(units)
    producer = units.producers[layer.values]
    values = matrix(producer).unflatten(0, (units.parts, units.count, units.size))[-1]
    constants = torch.zeros_like(values[..., 0])
    if producer.bias is not None:
        constants = producer.bias.unflatten(0, (units.parts, units.count, units.size))[-1]
    # The weights of attention add up to one: the mean of equal values is that value.
    return _idle(units, (values == 0).all(-1).all(-1), constants)


def _idle_dimensions(layer: Layer) -> _Idle:
    units = layer.ffn
    if not units.count:
        return _nothing(units)
    (producer,) = units.producers.values()
    weights = matrix(producer).unflatten(0, (units.parts, units.count))
    biases = torch.zeros_like(weights[..., 0])
    if producer.bias is not None:
        biases = producer.bias.unflatten(0, (units.parts, units.count))
    is_constant = (weights == 0).all(-1)
    activated = layer.activation(biases[0])
    if units.parts == 1:
        return _idle(units, is_constant[0], activated[:, None])
    # Of the two factors of a gated dimension one must be zero; both may also be constant.
    zero = (is_constant[0] & (activated == 0)) | (is_constant[1] & (biases[1] == 0))
    constants = torch.where(zero, 0.0, activated * biases[1])
    return _idle(units, zero | is_constant.all(0), constants[:, None])


def _idle(units: Units, is_constant: Tensor, constants: Tensor) -> _Idle:
    """Those that are constant and have a bias to hold the constant, and those of which nothing is read."""
    _, consumer = units.consumer
    unread = (matrix(consumer).unflatten(1, (units.count, units.size)) == 0).all(-1).all(0)
    can_go = is_constant if consumer.bias is not None else is_constant & (constants == 0).all(-1)
    return _Idle(unread | can_go, torch.where(unread[:, None], 0.0, constants))


def _nothing(units: Units) -> _Idle:
    weight = matrix(units.consumer[1])
    return _Idle(torch.ones(0, dtype=torch.bool, device=weight.device), weight.new_zeros(0, units.size))


def _without(units: Units, idle: _Idle, round_to: int) -> list[int]:
    """The units to keep, once what the others add is a part of the consumer's bias."""
    places = idle.places.clone()
    spare = -int((~places).sum()) % round_to
    candidates = places.nonzero().flatten()
    largest = _magnitudes(units)[candidates].argsort(descending=True, stable=True)
    places[candidates[largest[:spare]]] = False
    _, consumer = units.consumer
    if consumer.bias is not None:
        consumer.bias.copy_(idle.added(units, places))
    return (~places).nonzero().flatten().tolist()


def _magnitudes(units: Units) -> Tensor:
    """(units,) the sum of the squares of the weights that make each unit or read it."""
    read = matrix(units.consumer[1]).square().sum(0)
    made = [
        matrix(producer).square().sum(1).unflatten(0, (units.parts, -1)).sum(0) for producer in units.producers.values()
    ]
    return (read + sum(made)).unflatten(0, (units.count, units.size)).sum(1)
