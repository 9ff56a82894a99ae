"""The terms of a distillation loss: what each asks of the models, what it counts, and how its loss is fed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunelle.losses import DecoupledLoss, HardLabelLoss, LogitMSELoss, TopKTargetLoss, top_k_distribution
from prunelle.tasks.metrics import IGNORED, UNLABELED
from prunelle.trainers.attention import Vectors


@dataclass(frozen=True)
class Batch:
    """What a batch asks for beside the models' inputs.

    Args:
        labels: (batch,) classes or numbers; (batch, tokens) a class each, -100 where nothing is asked; (batch, 2) the
            tokens where an answer starts and ends; (batch, labels) 1 for those that a text has, else 0. Where there is
            none, and the teacher has its say, -101; for (batch,) classes -100 too.
        attention_mask: (batch, tokens), 1 for attended tokens.
    """

    labels: Tensor
    attention_mask: Tensor


def batch_of(inputs: Mapping[str, Tensor]) -> Batch:
    """What a collated batch asks for: of an encoder-decoder, of what it writes."""
    return Batch(inputs["labels"], inputs.get("decoder_attention_mask", inputs["attention_mask"]))


@dataclass(frozen=True)
class Outputs:
    """What a model says about a batch.

    Args:
        logits: (rows, classes), one row for each example or position that is asked for.
        hidden_states: (batch, tokens, hidden) of the embeddings and of each layer; empty where no term asks.
        vectors: queries, keys and values of the layers that a term asks for.
    """

    logits: Any
    hidden_states: Sequence[Tensor]
    vectors: Mapping[int, Vectors]

    def rows(self, chosen: slice) -> "Outputs":
        """The same with some of the logits."""
        return replace(self, logits=self.logits[chosen])


@dataclass(frozen=True)
class SoftTargets:
    """What the soft targets' loss needs of the teacher; a cache keeps it in the teacher's place.

    Args:
        tensors: in the order in which the loss takes them, (rows, …), a row for each position distilled.
    """

    tensors: Mapping[str, Tensor]

    def rows(self, chosen: slice) -> "SoftTargets":
        """Some of them."""
        return SoftTargets({name: tensor[chosen] for name, tensor in self.tensors.items()})


class Term(nn.Module):
    """A named part of the loss: the sum over its items in a batch, divided by `num_items`.

    One that needs logits gets a batch whose labels are those of the logits' rows, and may get it in chunks of rows.
    Its parameters, if any, are learned beside the student's.
    """

    needs_teacher = True
    needs_logits = False
    needs_hidden_states = False
    # Whether logits are needed at all attended tokens, and not at the labelled ones alone.
    everywhere = False
    # (teacher, student) numbers of the layers whose queries, keys and values are needed.
    vector_pairs: Sequence[tuple[int, int]] = ()

    def count(self, batch: Batch) -> Tensor:
        """How many items the term runs over in one batch."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, num_items: Tensor) -> Tensor:
        raise NotImplementedError


class SoftTargetTerm(Term):
    """The teacher's distribution: of each example's choices, or at the labelled or all attended ones of its tokens."""

    needs_logits = True

    def __init__(self, loss: nn.Module, everywhere: bool, top_k: int) -> None:
        super().__init__()
        self.loss, self.everywhere, self.top_k = loss, everywhere, top_k

    def count(self, batch: Batch) -> Tensor:
        return asked(batch, self.everywhere).sum()

    @property
    def identity(self) -> dict[str, float]:
        """What the targets depend on beside the teacher."""
        if isinstance(self.loss, TopKTargetLoss):
            return {"top_k": self.top_k, "temperature": self.loss.temperature}
        return {}

    def targets(self, teacher: Outputs) -> SoftTargets:
        if isinstance(self.loss, TopKTargetLoss):
            log_probabilities, indices = top_k_distribution(teacher.logits, self.top_k, self.loss.temperature)
            return SoftTargets({"log_probabilities": log_probabilities, "indices": indices})
        return SoftTargets({"logits": teacher.logits})

    def forward(self, student: Outputs, teacher: Outputs | SoftTargets, batch: Batch, num_items: Tensor) -> Tensor:
        targets = teacher if isinstance(teacher, SoftTargets) else self.targets(teacher)
        labels = [batch.labels] if isinstance(self.loss, DecoupledLoss) else []
        return self.loss(student.logits, *targets.tensors.values(), *labels, num_items)


class HardLabelTerm(Term):
    """The labels, or the masked tokens.

    Args:
        label_smoothing: as `HardLabelLoss` takes it; numbers are not smoothed.
    """

    needs_teacher = False
    needs_logits = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.loss, self.squared_error = HardLabelLoss(label_smoothing), LogitMSELoss()

    def count(self, batch: Batch) -> Tensor:
        return known_labels(batch).ne(IGNORED).sum()

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, num_items: Tensor) -> Tensor:
        labels = known_labels(batch)
        if labels.is_floating_point():  # numbers, which the one logit is to meet; without one it is where it is to be
            met = torch.where(labels.eq(IGNORED), student.logits[:, 0].detach(), labels)
            return self.squared_error(student.logits, met[:, None], num_items)
        return self.loss(student.logits, labels, num_items)


class HiddenTerm(Term):
    """A loss on hidden states, averaged over pairs of them.

    Args:
        losses: one a pair, each with the projection of its own, if any.
        pairs: (teacher, student) places in `hidden_states`: 0 is the embeddings' output.
        items: what the loss counts.
    """

    needs_hidden_states = True

    def __init__(
        self, losses: Sequence[nn.Module], pairs: Sequence[tuple[int, int]], items: Callable[[Batch], Tensor]
    ) -> None:
        super().__init__()
        self.losses, self.pairs, self.items = nn.ModuleList(losses), pairs, items

    def count(self, batch: Batch) -> Tensor:
        return self.items(batch)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, num_items: Tensor) -> Tensor:
        values = [
            loss(student.hidden_states[ours], teacher.hidden_states[theirs], batch.attention_mask, num_items)
            for loss, (theirs, ours) in zip(self.losses, self.pairs, strict=True)
        ]
        return sum(values[1:], start=values[0]) / len(values)


class VectorTerm(Term):
    """A loss on queries, keys and values, averaged over pairs of layers and over what is related.

    Args:
        losses: by what is related: `attention`, queries to keys, or `query`, `key` or `value`, each to its like.
        pairs: (teacher, student) numbers of layers.
        items: what the loss counts.
    """

    def __init__(
        self, losses: Mapping[str, nn.Module], pairs: Sequence[tuple[int, int]], items: Callable[[Batch], Tensor]
    ) -> None:
        super().__init__()
        self.losses, self.vector_pairs, self.items = nn.ModuleDict(losses), pairs, items

    def count(self, batch: Batch) -> Tensor:
        return self.items(batch)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, num_items: Tensor) -> Tensor:
        values = []
        for theirs, ours in self.vector_pairs:
            for name, loss in self.losses.items():
                ends = ("query", "key") if name == "attention" else (name, name)
                layers = (student.vectors[ours], teacher.vectors[theirs])
                vectors = [getattr(layer, end) for layer in layers for end in ends]
                values.append(loss(*vectors, batch.attention_mask, num_items))
        return sum(values[1:], start=values[0]) / len(values)


class RelationalTerm(Term):
    """A loss on how the examples of one micro-batch lie to each other: their last hidden states, averaged.

    Args:
        loss: on one vector an example.
        order: how many different examples each item is made of.
    """

    needs_hidden_states = True

    def __init__(self, loss: nn.Module, order: int) -> None:
        super().__init__()
        self.loss, self.order = loss, order

    def count(self, batch: Batch) -> Tensor:
        rows = len(batch.labels)
        items = rows * (rows - 1) // 2 if self.order == 2 else rows * (rows - 1) * (rows - 2)
        return torch.full((), items, device=batch.labels.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, num_items: Tensor) -> Tensor:
        ours, theirs = (_mean(outputs.hidden_states[-1], batch.attention_mask) for outputs in (student, teacher))
        return self.loss(ours, theirs, num_items)


def known_labels(batch: Batch) -> Tensor:
    """The labels, -100 wherever there is none to learn."""
    return batch.labels.masked_fill(batch.labels.eq(UNLABELED), IGNORED)


def asked(batch: Batch, everywhere: bool) -> Tensor:
    """Where logits are looked at, as the labels' shape: in each example, or at its labelled or all attended tokens."""
    if batch.labels.shape != batch.attention_mask.shape:  # the teacher has its say on unlabeled examples too
        return torch.ones_like(batch.labels, dtype=torch.bool)
    labelled = batch.labels.ne(IGNORED)
    return labelled | batch.attention_mask.bool() if everywhere else labelled


def asked_positions(batch: Batch, everywhere: bool) -> Tensor:
    """(rows,) the numbers of the labels where logits are looked at, one example after the other."""
    return asked(batch, everywhere).flatten().nonzero().squeeze(-1)


def attended_tokens(batch: Batch) -> Tensor:
    return batch.attention_mask.sum()


def attended_examples(batch: Batch) -> Tensor:
    return batch.attention_mask.bool().any(-1).sum()


def attended_pairs(batch: Batch) -> Tensor:
    return batch.attention_mask.sum(-1).square().sum()


def causal_pairs(batch: Batch) -> Tensor:
    tokens = batch.attention_mask.sum(-1)
    return (tokens * (tokens + 1)).sum() // 2


def _mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(batch, hidden) the mean of the attended tokens' states."""
    attended = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * attended).sum(1) / attended.sum(1).clamp(min=1)
