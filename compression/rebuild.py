"""A model made anew from another's configuration and weights, once these have been changed.

It is what its stock class builds from its config: whatever it computes in memory, its checkpoint computes again.
"""

import copy
from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from prunelle.compression.shapes import shaped_class


def copied_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration, in which it stands whether the model's head is tied to its embeddings."""
    config = copy.deepcopy(model.config)
    # A checkpoint with two different matrices is loaded untied even where its config says tied.
    if (head := model.get_output_embeddings()) is not None:
        config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    return config


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this class, which may be shrunk, with weights drawn at random."""
    model = shaped_class(model_class, config)._from_config(config, dtype=dtype)
    model.__class__ = model_class
    return model


def fill(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], source: PreTrainedModel) -> PreTrainedModel:
    """The model with these weights, which become its own, on the source's device, in evaluation mode."""
    model.to(source.device)
    model.load_state_dict(weights)
    if model.can_generate() and source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()
