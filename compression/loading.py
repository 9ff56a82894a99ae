"""Loads any checkpoint, those included whose layers stock classes cannot build."""

import copy
from contextlib import suppress
from functools import partial
from typing import Any

import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from prunelle.compression.pruning.nn_pruning_checkpoints import read_nn_pruning, say_pruned_heads
from prunelle.compression.shapes import shaped_class
from prunelle.compression.sparse import read_sparse
from prunelle.errors import InputError, load_checkpoint_with


def from_pretrained(name_or_path: str, model_class: Any = None, **options: Any) -> Any:
    """Loads a model, shrunk or not, its zeros stored or not, and what nn_pruning wrote: masked, or without some heads.

    Args:
        name_or_path: a checkpoint folder, or a model of the hub.
        model_class: a model class or an Auto class, such as `AutoModelForSequenceClassification`. By default the
            class that the configuration names first.
        options: as for the stock `from_pretrained`; `config` among them, if it has been read already.

    Returns:
        What the stock `from_pretrained` returns: the model in evaluation mode, and with `output_loading_info=True`
        what was missing beside it. Its class is the stock one.

    Raises:
        InputError: there is no such checkpoint, it cannot be loaded, or its configuration names no class.
    """
    config = options.pop("config", None) or load_checkpoint_with(AutoConfig.from_pretrained, str(name_or_path))
    config = copy.deepcopy(config)  # which is to say what the model is, once it is known
    stock = _stock_class(config, model_class, str(name_or_path))
    loaded = load_checkpoint_with(partial(_load, stock), str(name_or_path), config=config, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.__class__ = stock
    return loaded


def _load(stock: type[PreTrainedModel], name: str, config: PreTrainedConfig, **options: Any) -> Any:
    """`from_pretrained`, told the weights where it would not find them."""
    weights = read_sparse(name)
    if weights is None:
        weights = read_nn_pruning(name, config)
    say_pruned_heads(config, stock)
    model_class = shaped_class(stock, config)
    if weights is None:
        return model_class.from_pretrained(name, config=config, **options)
    if model_class.can_generate():
        with suppress(OSError):  # it has none: what the model's configuration says then stands
            options = {"generation_config": GenerationConfig.from_pretrained(name)} | options
    loaded = model_class.from_pretrained(None, config=config, state_dict=weights, **options)
    (loaded[0] if isinstance(loaded, tuple) else loaded).name_or_path = name
    return loaded


def _stock_class(config: PreTrainedConfig, model_class: Any, name: str) -> type[PreTrainedModel]:
    if model_class is None:
        (architecture, *_) = config.architectures or [None]
        found = getattr(transformers, architecture or "", None)
        if found is None:
            raise InputError(f"{name} names no architecture of transformers ({architecture}): give the model class")
        return found
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    mapped = model_class._model_mapping.get(type(config), None)
    if mapped is None:
        raise InputError(f"{name} is a {config.model_type}, which {model_class.__name__} does not know")
    return mapped[0] if isinstance(mapped, tuple) else mapped
