"""Several teachers that speak as one."""

import inspect
import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from prunelle.errors import InputError
from prunelle.tasks import answers_questions, choices, problem_type
from prunelle.tasks.choices import MULTI_LABEL
from prunelle.trainers.own_tokens import OwnTokens


class Ensemble(nn.Module):
    r"""Teachers as one teacher: its logits are their mean.

    The mean of probabilities is taken at the temperature of the loss that listens:
    :math:`\sum_i w_i \mathrm{softmax}(t_i / T)`. As logits that is T times its logarithm, and a constant, for which
    the mean of the teachers' own is taken: the same teacher twice says what it says once, in every loss. The mean of
    logits is a normalized geometric mean of probabilities, at any temperature.

    All else (hidden states, queries, keys and values, the configuration) is the first teacher's.

    Args:
        teachers: of one task, which read the same token ids or are `OwnTokens`; classifiers with the same classes,
            which come out in the first's order.
        weights: one a teacher, above 0, of which only the ratios count; by default all alike.
        mean: of what.
        temperature: T, above 0.

    Raises:
        InputError: The teachers have other classes or other vocabularies than the first, or are encoder-decoders.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, names both means.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        mean: Literal["probabilities", "logits"] = "probabilities",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        weights = weights or [1.0] * len(teachers)
        self.weights = [weight / sum(weights) for weight in weights]
        self.mean, self.temperature = mean, temperature
        first, *_ = read = members(self)
        self.config = first.config
        self.own_inputs = tuple(name for each in teachers for name in getattr(each, "own_inputs", ()))
        if self.config.is_encoder_decoder:
            raise InputError("several encoder-decoders do not write one text: give one teacher")
        self.identity = {"weights": self.weights, "mean": mean, "temperature": temperature}
        self.multi_label = problem_type(first) == MULTI_LABEL
        self.orders = [_class_order(teacher, first) for teacher in read]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """What the first teacher returns, but for the logits.

        Args:
            input_ids, attention_mask, token_type_ids: (batch, tokens); each teacher gets what it takes.
            more: inputs of those that read their own tokens; and such as output_hidden_states, which nobody asks of
                others than the first.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs |= {name: more.pop(name) for name in self.own_inputs if name in more}
        first, *others = self.teachers
        outputs = first(**taken(first, inputs), **more)
        every = [outputs, *(other(**taken(other, inputs)) for other in others)]
        if not answers_questions(first):
            for each, order in zip(every, self.orders, strict=True):
                each.logits = each.logits if order is None else each.logits[..., order]
        mean = self._mean([choices(each, self.multi_label) for each in every])
        if self.multi_label:
            outputs.logits = mean[..., 1] - mean[..., 0]
        elif answers_questions(first):
            outputs.start_logits, outputs.end_logits = mean.unbind(1)
        else:
            outputs.logits = mean
        return outputs

    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        if self.mean == "logits":
            return reduce(add, (weight * each for weight, each in zip(self.weights, logits, strict=True)))
        softened = [each.to(torch.promote_types(each.dtype, torch.float32)) / self.temperature for each in logits]
        norms = [each.logsumexp(-1, keepdim=True) for each in softened]
        weighed = list(zip(self.weights, softened, norms, strict=True))
        # One after the other: stacked, a vocabulary's logits would be copied once more for each teacher.
        mean = reduce(torch.logaddexp, (each - norm + math.log(weight) for weight, each, norm in weighed))
        return self.temperature * (mean + sum(weight * norm for weight, _, norm in weighed))


def members(teacher: nn.Module) -> list[PreTrainedModel]:
    """The teachers that a teacher is made of: itself, unless it is an ensemble. Losses on features hear the first."""
    return [each.teacher if isinstance(each, OwnTokens) else each for each in _each(teacher)]


def readers_of_the_same(teacher: nn.Module) -> list[PreTrainedModel]:
    """Those of its members that read the student's token ids."""
    return [each for each in _each(teacher) if not isinstance(each, OwnTokens)]


def _each(teacher: nn.Module) -> list[Any]:
    return list(teacher.teachers) if isinstance(teacher, Ensemble) else [teacher]


def class_names(config: PreTrainedConfig) -> list[str] | None:
    """A classifier's classes, in lower case and in the order of its logits; None where they are only numbered."""
    names = [str(config.id2label[index]).lower() for index in range(config.num_labels)]
    return None if all(name in (str(index), f"label_{index}") for index, name in enumerate(names)) else names


def input_names(model: nn.Module) -> set[str]:
    """What a model takes, labels aside."""
    return {*inspect.signature(model.forward).parameters, *getattr(model, "own_inputs", ())} - {"labels"}


def taken(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of the inputs that are given and that the model takes."""
    accepted = input_names(model)
    return {name: value for name, value in inputs.items() if name in accepted and value is not None}


def _class_order(teacher: PreTrainedModel, first: PreTrainedModel) -> list[int] | None:
    """Where the first teacher's classes stand in another's logits; None where they stand in the same places."""
    ours, theirs = teacher.config, first.config
    if first.get_output_embeddings() is not None:
        if ours.vocab_size != theirs.vocab_size:
            raise InputError(
                f"the teacher {ours.name_or_path} has {ours.vocab_size} tokens and {theirs.name_or_path} "
                f"{theirs.vocab_size}: all must read the same token ids"
            )
        return None
    if answers_questions(first):
        return None
    names, wanted = class_names(ours), class_names(theirs)
    if ours.num_labels == theirs.num_labels and (names is None or wanted is None or names == wanted):
        return None
    if names is None or wanted is None or sorted(names) != sorted(wanted):
        raise InputError(
            f"the teacher {ours.name_or_path} predicts {', '.join(ours.id2label.values())}, and "
            f"{theirs.name_or_path} {', '.join(theirs.id2label.values())}: they must be the same"
        )
    return [names.index(name) for name in wanted]
