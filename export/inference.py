"""A model as it is deployed: evaluation mode, on the CPU, in float32, with nothing but logits out."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.errors import InputError
from prunelle.tasks import answers_questions

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("logits",)
ANSWER_OUTPUTS = ("start_logits", "end_logits")


class ExportError(InputError):
    """The model given cannot be exported, or its ONNX file does not compute what the model does."""


def model_input_names(model: nn.Module) -> tuple[str, ...]:
    """The names among input_ids, attention_mask and token_type_ids that can change the model's output.

    A model that reads tokens of its own, beside those of others, says in `own_inputs` what these are called.

    RoBERTa, DeBERTa-v2 and GPT-2 take token_type_ids as an argument but know only one type of token (or
    look the types up among the words); their tokenizers do not give them, and a file that asked for them
    could not be fed.
    """
    taken = inspect.signature(model.forward).parameters
    if "input_ids" not in taken:
        raise InputError(f"{type(model).__name__} takes no input_ids: only text models can be exported")
    types = getattr(getattr(model, "config", None), "type_vocab_size", None) or 0
    plain = tuple(name for name in INPUT_NAMES if name in taken and (name != "token_type_ids" or types > 1))
    return plain + tuple(getattr(model, "own_inputs", ()))


def output_names(model: nn.Module) -> tuple[str, ...]:
    """What the model's logits are called: two tensors where an answer's start and end are asked, as everywhere."""
    return ANSWER_OUTPUTS if answers_questions(model) else OUTPUTS


def maximum_length(model: nn.Module, default: int = 512) -> int:
    """The most tokens that the model's position embeddings reach; `default` where nothing limits them.

    Tables with a padding index (RoBERTa, MPNet) count their positions from the index after it.
    """
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "wpe")) and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    return getattr(getattr(model, "config", None), "max_position_embeddings", None) or default


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids all the models that a model is made of can read."""
    return min(each.config.vocab_size for each in model.modules() if isinstance(each, PreTrainedModel))


@contextmanager
def deployed(*models: nn.Module) -> Iterator[None]:
    """Puts the models into evaluation mode, on the CPU and in float32, and back again at the end.

    Dropout, half precision or another device would make every comparison with a file that has none of
    them a comparison of something else. Parameters stay the same objects, so optimizers keep theirs.
    """
    before = []
    for model in models:
        tensors = [*model.parameters(), *model.buffers()]
        before.append(
            (
                [(module, module.training) for module in model.modules()],
                [(tensor, tensor.device, tensor.dtype) for tensor in tensors],
            )
        )
    try:
        for model in models:
            model.eval().to("cpu").float()
        yield
    finally:
        for modes, places in before:
            for tensor, device, dtype in places:
                tensor.data = tensor.data.to(device, dtype)
            for module, training in modes:
                module.training = training


class LogitsOnly(nn.Module):
    """The model as a function of its input tensors to its logits, traced or called without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.taken = inspect.signature(model.forward).parameters
        # Rotary positions are computed for one row and broadcast. The ONNX operator does not broadcast
        # them, so positions are spelt out for each row.
        self.spells_positions = hasattr(getattr(model, "config", None), "rope_parameters")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **own: Tensor,
    ) -> tuple[Tensor, ...]:
        """input_ids, attention_mask, token_type_ids: (batch, length) int64. Returns what `output_names` names."""
        inputs: dict[str, Any] = {"input_ids": input_ids, **own}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.spells_positions and "position_ids" in self.taken:
            inputs["position_ids"] = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        if "use_cache" in self.taken:
            inputs["use_cache"] = False
        outputs = self.model(**inputs)
        return tuple(outputs[name] for name in (ANSWER_OUTPUTS if "start_logits" in outputs else OUTPUTS))
