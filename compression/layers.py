"""Where a transformer keeps its layers: found by structure, so that no table of model names grows old."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prunelle.errors import InputError

# How the configurations of encoder-decoders call the depth of the decoder: BART's family, T5's.
DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers")


@dataclass(frozen=True)
class LayerList:
    """The stack of layers of a model.

    Args:
        name: qualified name within the model, as in `bert.encoder.layer`; the weights of layer 3 begin
            with `bert.encoder.layer.3.` in the model's state dict.
        modules: the stack itself, in the order of computation.
        depth: what the config calls the number of layers.
    """

    name: str
    modules: nn.ModuleList
    depth: str = "num_hidden_layers"


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
            several kinds), or several (an encoder and a decoder: `find_stacks` finds both).
    """
    return _find(model, model.base_model, "num_hidden_layers")


def find_stacks(model: PreTrainedModel) -> list[LayerList]:
    """Finds the layers of a model, or those of its encoder and those of its decoder where it has both.

    Raises:
        InputError: as `find_layers`, for either; or the config does not say how deep the decoder is.
    """
    if not model.config.is_encoder_decoder:
        return [find_layers(model)]
    return [
        _find(model, model.get_encoder(), "num_hidden_layers"),
        _find(model, model.get_decoder(), decoder_depth(model.config)),
    ]


def decoder_depth(config: PreTrainedConfig) -> str:
    """What the config of an encoder-decoder calls the number of the decoder's layers.

    Raises:
        InputError: it is none of the names known.
    """
    name = next((name for name in DECODER_DEPTHS if hasattr(config, name)), None)
    if name is None:
        raise InputError(f"{type(config).__name__} has none of {', '.join(DECODER_DEPTHS)}: no T5, BART or their like")
    return name


def _find(model: PreTrainedModel, base: nn.Module, depth_name: str) -> LayerList:
    depth = getattr(model.config, depth_name, None)
    names = {module: name for name, module in model.named_modules()}
    prefix = f"{names[base]}." if names[base] else ""
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
            f"(config.{depth_name}): found {found}; a model with exactly one such list, "
            "all its blocks of one class, is needed"
        )
    return LayerList(outermost[0], stacks[outermost[0]], depth_name)


def _contents(blocks: nn.ModuleList) -> str:
    kinds = dict.fromkeys(type(block).__name__ for block in blocks)
    return f"{len(blocks)} x {' or '.join(kinds)}"
