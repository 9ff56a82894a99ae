"""Where a transformer keeps its layers: found by structure, so that no table of model names grows old."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from prunelle.errors import InputError


@dataclass(frozen=True)
class LayerList:
    """The stack of layers of a model.

    Args:
        name: qualified name within the model, as in `bert.encoder.layer`; the weights of layer 3 begin
            with `bert.encoder.layer.3.` in the model's state dict.
        modules: the stack itself, in the order of computation.
    """

    name: str
    modules: nn.ModuleList


def find_layers(model: PreTrainedModel) -> LayerList:
    """Finds the encoder's or the decoder's layers of any transformers model.

    They are the one `ModuleList` of the base model that holds as many blocks, all of one class, as the
    config has hidden layers. Lists inside such a list (the parts of each block) do not count.

    Args:
        model: with whatever head, or none.

    Returns:
        The list and its qualified name in `model`.

    Raises:
        InputError: the model has no such list (layers that share their weights, as ALBERT's; blocks of
            several kinds), or several (an encoder and a decoder).
    """
    depth = getattr(model.config, "num_hidden_layers", None)
    names = {module: name for name, module in model.named_modules()}
    base = names[model.base_model]
    prefix = f"{base}." if base else ""
    lists = {
        name: module for module, name in names.items() if isinstance(module, nn.ModuleList) and name.startswith(prefix)
    }
    stacks = {
        name: blocks
        for name, blocks in lists.items()
        if len(blocks) == depth and len({type(block) for block in blocks}) == 1
    }
    outermost = [name for name in stacks if not any(name.startswith(f"{outer}.") for outer in stacks)]
    if len(outermost) != 1:
        found = ", ".join(f"{name} ({_contents(lists[name])})" for name in outermost or lists) or "none"
        raise InputError(
            f"{type(model).__name__} has {'several lists' if outermost else 'no list'} of {depth} layers "
            f"(config.num_hidden_layers): found {found}; a model with exactly one such list, "
            "all its blocks of one class, is needed"
        )
    return LayerList(outermost[0], stacks[outermost[0]])


def _contents(blocks: nn.ModuleList) -> str:
    kinds = dict.fromkeys(type(block).__name__ for block in blocks)
    return f"{len(blocks)} x {' or '.join(kinds)}"
