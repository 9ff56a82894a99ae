"""The loss of a distillation: named terms with weights, made for one teacher and one student."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression import decoder_depth
from prunelle.errors import InputError
from prunelle.losses import (
    AttentionMapLoss,
    DecoupledLoss,
    HiddenCosineLoss,
    HiddenMSELoss,
    HiddenProjection,
    JensenShannonLoss,
    LogitMSELoss,
    PatientLoss,
    RelationalAngleLoss,
    RelationalDistanceLoss,
    ReverseKLLoss,
    SelfAttentionRelationLoss,
    SoftTargetLoss,
    TopKTargetLoss,
)
from prunelle.tasks import answers_questions, choices, problem_type
from prunelle.tasks.choices import MULTI_LABEL, REGRESSION
from prunelle.trainers.arguments import DistillationArguments, PredictionArguments
from prunelle.trainers.attention import SelfAttention, attends_by_products, catch, find_attention
from prunelle.trainers.ensemble import Ensemble, class_names, members, readers_of_the_same
from prunelle.trainers.head import Head, Logits, find_head, summed_over_chunks
from prunelle.trainers.layer_map import layer_pairs
from prunelle.trainers.schedule import Schedule
from prunelle.trainers.terms import (
    Batch,
    HardLabelTerm,
    HiddenTerm,
    Outputs,
    RelationalTerm,
    SoftTargets,
    SoftTargetTerm,
    Term,
    VectorTerm,
    asked_positions,
    attended_examples,
    attended_pairs,
    attended_tokens,
    causal_pairs,
)


class Objective(nn.Module):
    """Named terms and their weights. Its parameters are the projections: learned, and no part of the student.

    Args:
        terms: by the name they are logged under.
        weights: by the same names; above 0, or they move there.
        student_attention, teacher_attention: of the layers whose queries, keys and values a term asks for.
        student_head, teacher_head: of language models, where they can be split off.
        schedules: of weights, by their flags' names, and of the temperature.
        softened: what has a temperature.
        multi_label: whether each class is a choice of its own.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        weights: Mapping[str, float],
        student_attention: Mapping[int, SelfAttention],
        teacher_attention: Mapping[int, SelfAttention],
        student_head: Head | None = None,
        teacher_head: Head | None = None,
        schedules: Sequence[Schedule] = (),
        softened: Sequence[Any] = (),
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)
        self.multi_label = multi_label
        self.student_attention, self.teacher_attention = student_attention, teacher_attention
        self.student_head, self.teacher_head = student_head, teacher_head
        self.schedules, self.softened = schedules, list(softened)
        self.moved: dict[str, float] = {}
        self.needs_teacher = any(term.needs_teacher for term in terms.values())
        self.needs_logits = any(term.needs_logits for term in terms.values())
        self.needs_hidden_states = any(term.needs_hidden_states for term in terms.values())
        self.looks_inside = self.needs_hidden_states or bool(teacher_attention)
        self.everywhere = any(term.everywhere for term in terms.values())

    def move(self, progress: float) -> None:
        """Set the weights and the temperature that are scheduled to what they are when a share of the run is done."""
        self.moved = {schedule.name: schedule.at(progress) for schedule in self.schedules}
        for name, value in self.moved.items():
            if name == "temperature":
                for each in self.softened:
                    each.temperature = value
            else:
                self.weights[name.removesuffix("_weight")] = value

    def count(self, batch: Batch) -> Tensor:
        """(terms,) how many items each term runs over in one batch."""
        return torch.stack([term.count(batch) for term in self._each().values()])

    def positions(self, batch: Batch) -> Tensor:
        """(rows,) where logits are needed, as the numbers of labels, one example after the other."""
        return asked_positions(batch, self.everywhere) if self.needs_logits else batch.labels.new_empty(0)

    def ask(self, teacher: nn.Module, features: Mapping[str, Any], positions: Tensor) -> Outputs:
        """Run the teacher, without gradients, and keep what the terms ask for: of logits the rows at the positions.

        Args:
            positions: as `positions` gives them.
        """
        # The student's backward pass needs what it is compared with inside, and takes no tensors of inference mode.
        without_gradients = torch.no_grad if self.looks_inside else torch.inference_mode
        if (head := self.teacher_head) is None:
            with without_gradients():
                outputs = self._observe(teacher, features, self.teacher_attention)
            return replace(outputs, logits=_rows(outputs.logits, positions))
        logits: list[Logits] = []

        def keep(states: Tensor) -> Tensor:
            logits.append(Logits(states, head.decoder))
            return states

        with without_gradients(), head.taken_over(positions, keep):
            outputs = self._observe(teacher, features, self.teacher_attention)
        return replace(outputs, logits=logits[0])

    def forward(
        self,
        student: nn.Module,
        features: Mapping[str, Any],
        teacher: Outputs | SoftTargets | None,
        batch: Batch,
        positions: Tensor,
        items: Tensor,
        whole_logits: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Run the student: the weighted sum of the terms, each of them before it is weighed, the logits.

        Args:
            teacher: what `ask` returned, or what a cache kept of it.
            positions: as `positions` gives them.
            items: (terms,) what to divide each term by.
            whole_logits: whether all logits are wanted; else a language model's are computed at the positions alone,
                in chunks, and a scalar stands in their place.
        """
        counts = dict(zip(self.terms, items, strict=True))
        on_logits = {name: term for name, term in self._each().items() if term.needs_logits}
        inside = {name: term for name, term in self._each().items() if not term.needs_logits}
        sums = dict.fromkeys(on_logits, torch.zeros((), device=items.device))
        labels = batch.labels.flatten().index_select(0, positions)

        def loss_on_logits(logits: Tensor, rows: slice) -> Any:
            said = None if teacher is None else teacher.rows(rows)
            chunk = Batch(labels[rows], batch.attention_mask)
            values = {n: term(Outputs(logits, (), {}), said, chunk, counts[n]) for n, term in on_logits.items()}
            sums.update({name: sums[name] + value.detach() for name, value in values.items()})
            return self._weighed(values)

        head = self.student_head
        if whole_logits or head is None:
            outputs = self._observe(student, features, self.student_attention)
            loss = loss_on_logits(_rows(outputs.logits, positions), slice(None))
        else:
            decoder = head.decoder
            with head.taken_over(positions, lambda states: summed_over_chunks(states, decoder, loss_on_logits)):
                outputs = self._observe(student, features, self.student_attention)
            loss = outputs.logits
        values = {name: term(outputs, teacher, batch, counts[name]) for name, term in inside.items()}
        unweighed = sums | {name: value.detach() for name, value in values.items()}
        return loss + self._weighed(values), {name: unweighed[name] for name in self.terms}, outputs.logits

    def _each(self) -> dict[str, Term]:
        return {name: term for name, term in self.terms.items() if isinstance(term, Term)}

    def _weighed(self, terms: Mapping[str, Tensor]) -> Any:
        return sum(self.weights[name] * term for name, term in terms.items())

    def _observe(
        self, model: nn.Module, features: Mapping[str, Any], attention: Mapping[int, SelfAttention]
    ) -> Outputs:
        hidden = {"output_hidden_states": True} if self.needs_hidden_states else {}
        with catch(attention) as vectors:
            outputs = model(**features, **hidden)
        # An encoder-decoder's are those of its decoder: there its logits stand.
        states = outputs.get("decoder_hidden_states") or outputs.get("hidden_states") or ()
        return Outputs(choices(outputs, self.multi_label), states, vectors)


def _rows(logits: Tensor, positions: Tensor) -> Tensor:
    """(rows, classes) of what `tasks.choices` gives."""
    return logits.flatten(0, -2).index_select(0, positions)


def build_objective(student: PreTrainedModel, teacher: nn.Module, arguments: DistillationArguments) -> Objective:
    """The terms of weight above 0, made for the two; of an ensemble, losses on features compare the first teacher.

    Raises:
        InputError: The two cannot be compared in the way that is asked: vocabulary, classes, hidden sizes, layers
            or heads.
    """
    teacher_head, ensemble = find_head(teacher), [teacher] if isinstance(teacher, Ensemble) else []
    first, *_ = members(teacher)
    if first in readers_of_the_same(teacher):
        check_same_vocabulary(student, first)
    elif inside := arguments.terms_inside:
        raise InputError(
            f"the teacher {first.name_or_path} reads other tokens than the student, and what it holds inside is of "
            f"those: give {' '.join(f'--{name}_weight 0' for name in inside)}"
        )
    teacher = first
    check_same_classes(student, teacher, arguments)
    weights = {name: arguments.term_weights[name] for name in arguments.wanted_terms}
    ours: list[SelfAttention] = []
    theirs: list[SelfAttention] = []
    if {"attention", "relation"} & weights.keys():
        _check_catchable(student, arguments)
        ours, theirs = find_attention(student), find_attention(teacher)
        _check_direction(ours, theirs)

    every: dict[str, Callable[[], Term]] = {
        "soft_target": lambda: _soft_target(student, arguments),
        "hard_label": lambda: HardLabelTerm(arguments.label_smoothing_factor),
        "hidden_cosine": lambda: _hidden("hidden_cosine", student, teacher, arguments),
        "hidden_mse": lambda: _hidden("hidden_mse", student, teacher, arguments),
        "embedding": lambda: _hidden("embedding", student, teacher, arguments),
        "patient": lambda: _hidden("patient", student, teacher, arguments),
        "attention": lambda: _attention(student, teacher, ours[0].causal, arguments),
        "relation": lambda: _relation(student, teacher, ours, theirs, arguments),
        "relational_distance": lambda: RelationalTerm(RelationalDistanceLoss(), order=2),
        "relational_angle": lambda: RelationalTerm(RelationalAngleLoss(), order=3),
    }
    terms = {name: every[name]() for name in weights}
    softened = [*(term.loss for term in terms.values() if isinstance(term, SoftTargetTerm)), *ensemble]
    if problem_type(student) == REGRESSION and any(each.name == "temperature" for each in arguments.read_schedules):
        raise InputError("--schedules temperature: a number has no distribution to soften")
    caught = [pair for term in terms.values() for pair in term.vector_pairs]
    return Objective(
        terms,
        weights,
        {layer: ours[layer] for _, layer in caught},
        {layer: theirs[layer] for layer, _ in caught},
        find_head(student),
        teacher_head,
        arguments.read_schedules,
        softened,
        problem_type(teacher) == MULTI_LABEL,
    ).to(torch.promote_types(student.dtype, torch.float32))


def _soft_target(student: PreTrainedModel, arguments: DistillationArguments) -> Term:
    kind: str = arguments.soft_target_loss
    top_k = arguments.soft_target_top_k
    if arguments.teacher_cache and kind != "top_k" and _is_cut(student, arguments.teacher_cache_top_k):
        if kind != "forward_kl":
            raise InputError(
                f"--soft_target_loss {kind} needs all logits: with --teacher_cache give --teacher_cache_top_k "
                f"{student.config.vocab_size}, or --soft_target_loss forward_kl"
            )
        kind, top_k = "top_k", arguments.teacher_cache_top_k
    if problem_type(student) == REGRESSION:  # a number has no distribution
        return SoftTargetTerm(LogitMSELoss(), everywhere=False, top_k=top_k)
    return soft_target_term(arguments, kind, top_k)


def soft_target_term(arguments: PredictionArguments, kind: str, top_k: int) -> SoftTargetTerm:
    """The term of `--soft_target_loss kind`.

    Args:
        top_k: how many classes are kept apart, if it is `top_k`.
    """
    temperature = arguments.temperature
    weights = (arguments.decoupled_target_weight, arguments.decoupled_non_target_weight)
    losses: dict[str, Callable[[], nn.Module]] = {
        "forward_kl": lambda: SoftTargetLoss(temperature),
        "reverse_kl": lambda: ReverseKLLoss(temperature),
        "jensen_shannon": lambda: JensenShannonLoss(arguments.jensen_shannon_beta, temperature),
        "mse": LogitMSELoss,
        "decoupled": lambda: DecoupledLoss(*weights, temperature),
        "top_k": lambda: TopKTargetLoss(temperature),
    }
    return SoftTargetTerm(losses[kind](), arguments.distilled_positions == "all", top_k)


def _is_cut(model: PreTrainedModel, top_k: int) -> bool:
    """Whether the model has more to say than the top k: of a language model's vocabulary, not of a few classes."""
    return model.get_output_embeddings() is not None and top_k < model.config.vocab_size


def _hidden(name: str, student: PreTrainedModel, teacher: PreTrainedModel, arguments: DistillationArguments) -> Term:
    # In `hidden_states` layer 0 comes second, after the embeddings.
    mapped = [(theirs + 1, ours + 1) for theirs, ours in _pairs("layer_map", student, teacher, arguments)]
    kind: type[nn.Module]
    kind, pairs, items = {
        "hidden_cosine": (HiddenCosineLoss, [(-1, -1)], attended_tokens),
        "hidden_mse": (HiddenMSELoss, mapped, attended_tokens),
        "embedding": (HiddenMSELoss, [(0, 0)], attended_tokens),
        "patient": (PatientLoss, mapped, attended_examples),
    }[name]
    ours, theirs = student.config.hidden_size, teacher.config.hidden_size
    if arguments.hidden_projection == "none":
        if ours != theirs:
            raise InputError(
                f"the student's hidden size is {ours} and the teacher's {theirs}: learn a projection with "
                f"--hidden_projection identity, or give --{name}_weight 0"
            )
        return HiddenTerm([kind() for _ in pairs], pairs, items)
    projections = [HiddenProjection(ours, theirs, arguments.hidden_projection) for _ in pairs]
    return HiddenTerm([kind(projection) for projection in projections], pairs, items)


def _attention(
    student: PreTrainedModel, teacher: PreTrainedModel, causal: bool, arguments: DistillationArguments
) -> Term:
    heads = _attention_heads("--attention_weight", student, teacher)
    pairs = _pairs("layer_map", student, teacher, arguments)
    items = causal_pairs if causal else attended_pairs
    return VectorTerm({"attention": AttentionMapLoss(heads, causal)}, pairs, items)


def _relation(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ours: Sequence[SelfAttention],
    theirs: Sequence[SelfAttention],
    arguments: DistillationArguments,
) -> Term:
    pairs = _pairs("relation_layer_map", student, teacher, arguments)
    losses: dict[str, nn.Module] = {}
    for name in arguments.chosen_relations:
        if name == "attention":
            heads = _attention_heads("--relations attention", student, teacher)
        else:
            heads = arguments.relation_heads or teacher.config.num_attention_heads
            _check_heads(heads, name, "student", [ours[layer] for _, layer in pairs])
            _check_heads(heads, name, "teacher", [theirs[layer] for layer, _ in pairs])
        losses[name] = SelfAttentionRelationLoss(heads, ours[0].causal)
    return VectorTerm(losses, pairs, attended_tokens)


def _pairs(
    flag: str, student: PreTrainedModel, teacher: PreTrainedModel, arguments: DistillationArguments
) -> list[tuple[int, int]]:
    return layer_pairs(getattr(arguments, flag), f"--{flag}", _depth(teacher), _depth(student))


def _depth(model: PreTrainedModel) -> int:
    """How many layers lie under the hidden states that are compared."""
    config = model.config
    return getattr(config, decoder_depth(config) if config.is_encoder_decoder else "num_hidden_layers")


def check_same_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """See that the two can read the same token ids.

    Raises:
        InputError: One knows more than the other.
    """
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        raise InputError(
            f"the student's vocabulary has {ours} tokens and the teacher's {theirs}: both must read the same token ids"
        )


def check_same_classes(student: PreTrainedModel, teacher: PreTrainedModel, arguments: PredictionArguments) -> None:
    """See that what the two predict can be compared.

    Raises:
        InputError: They have other classes or first tokens; or too few classes for the top k.
    """
    ours, theirs = student.config, teacher.config
    if answers_questions(student):
        if "soft_target" in arguments.wanted_terms and arguments.soft_target_loss == "top_k":
            raise InputError("--soft_target_loss top_k is for many classes: an answer is one of a window's few tokens")
        return
    _check_problem(student, teacher, arguments)
    is_language_model = student.get_output_embeddings() is not None
    if not is_language_model and ours.num_labels != theirs.num_labels:
        raise InputError(f"the student has {ours.num_labels} classes and the teacher {theirs.num_labels}")
    names = class_names(ours), class_names(theirs)
    if not is_language_model and None not in names and names[0] != names[1]:
        raise InputError(
            f"the student's classes are {', '.join(ours.id2label.values())} and the teacher's "
            f"{', '.join(theirs.id2label.values())}: they must be the same, in the same order"
        )
    if ours.is_encoder_decoder and ours.decoder_start_token_id != theirs.decoder_start_token_id:
        raise InputError(
            f"the student's decoder starts from token {ours.decoder_start_token_id} and the teacher's from "
            f"{theirs.decoder_start_token_id}: they must be the same"
        )
    classes = ours.vocab_size if is_language_model else ours.num_labels
    if (
        "soft_target" in arguments.wanted_terms
        and arguments.soft_target_loss == "top_k"
        and arguments.soft_target_top_k >= classes
    ):
        raise InputError(
            f"--soft_target_top_k {arguments.soft_target_top_k} must be less than the {classes} classes: "
            "with all of them it is --soft_target_loss forward_kl"
        )


def _check_problem(student: PreTrainedModel, teacher: PreTrainedModel, arguments: DistillationArguments) -> None:
    ours, theirs, kind = problem_type(student), problem_type(teacher), arguments.soft_target_loss
    if ours != theirs and {ours, theirs} & {MULTI_LABEL, REGRESSION}:
        raise InputError(f"the student predicts {ours or 'classes'} and the teacher {theirs or 'classes'}")
    if "soft_target" not in arguments.wanted_terms:
        return
    if ours == REGRESSION and kind not in ("forward_kl", "mse"):
        raise InputError(f"--soft_target_loss {kind} compares distributions, and a number has none: leave it out")
    if ours == MULTI_LABEL and kind == "top_k":
        raise InputError("--soft_target_loss top_k is for many classes: each label is a choice between no and yes")


def _check_catchable(student: PreTrainedModel, arguments: DistillationArguments) -> None:
    if student.config.is_encoder_decoder:
        raise InputError(
            "--attention_weight and --relation_weight are for models with one stack of layers, and "
            f"{type(student).__name__} has an encoder and a decoder: give them 0"
        )
    if arguments.torch_compile:
        raise InputError(
            "--torch_compile passes over the hooks by which --attention_weight and --relation_weight catch queries, "
            "keys and values: give these 0, or do not compile"
        )
    if arguments.gradient_checkpointing and (arguments.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise InputError(
            "reentrant checkpointing of activations computes queries, keys and values without gradients, which "
            "attention and relations need: set use_reentrant to false"
        )


def _attention_heads(flag: str, student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """The number of attention heads of both."""
    ours, theirs = student.config.num_attention_heads, teacher.config.num_attention_heads
    if ours != theirs:
        raise InputError(
            f"{flag} compares head by head, and the student has {ours} attention heads and the teacher {theirs}; "
            "--relation_weight with the relations query,key,value splits heads anew"
        )
    for model in (student, teacher):
        if not attends_by_products(model):
            raise InputError(
                f"{flag}: the attention of {type(model).__name__} is not made of queries and keys alone (it adds "
                "positions to them later); --relation_weight with the relations query,key,value does without"
            )
    return ours


def _check_heads(heads: int, name: str, whose: str, attentions: Sequence[SelfAttention]) -> None:
    for attention in attentions:
        size = attention.sizes[("query", "key", "value").index(name)]
        if size % heads:
            raise InputError(
                f"{heads} relation heads (--relation_heads, by default the teacher's attention heads) do not "
                f"divide the {size} numbers of a token's {name} in the {whose}"
            )


def _check_direction(ours: Sequence[SelfAttention], theirs: Sequence[SelfAttention]) -> None:
    if ours[0].causal != theirs[0].causal:
        raise InputError(
            "one of student and teacher attends to earlier tokens alone and the other both ways: neither their "
            "attention nor their relations can be compared; give --attention_weight 0 and --relation_weight 0"
        )
