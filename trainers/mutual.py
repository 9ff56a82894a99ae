"""Mutual learning: peers that are trained side by side, each on the labels and on what the others say."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from prunelle.errors import InputError
from prunelle.tasks import Task, choices, problem_type
from prunelle.tasks.choices import MULTI_LABEL, REGRESSION
from prunelle.trainers.arguments import PredictionArguments
from prunelle.trainers.distillation import ObjectiveTrainer
from prunelle.trainers.ensemble import taken
from prunelle.trainers.models import companion, load_or_start, tokenizer_for
from prunelle.trainers.objective import Objective, check_same_classes, check_same_vocabulary, soft_target_term
from prunelle.trainers.schedule import Schedule
from prunelle.trainers.terms import Batch, HardLabelTerm, Outputs, Term


@dataclass
class PeerArguments:
    """The models that learn from one another."""

    peer_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Checkpoint folders or hub models, one a peer."}
    )
    peer_config: list[str] = field(
        default_factory=list,
        metadata={"help": "Peers from scratch: of each config.json's folder or file, or the JSON itself."},
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "By default the first peer's; with --peer_config alone one is trained on the training texts."
        },
    )

    def __post_init__(self) -> None:
        if len(self.peer_name_or_path) + len(self.peer_config) < 2:
            raise InputError("give two peers or more: --peer_name_or_path, --peer_config, or both")


@dataclass
class MutualArguments(PredictionArguments):
    """How the peers are trained. The defaults are those of the paper (arXiv:1706.00384)."""

    soft_target_weight: float = field(
        default=1.0, metadata={"help": "Weight of the mean difference from the other peers' distributions."}
    )
    hard_label_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    temperature: float = field(default=1.0, metadata={"help": "Softens all distributions; mse has none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, weight in self.term_weights.items():
            if not weight:
                raise InputError(f"--{name}_weight is 0: peers learn from the labels and from one another")


class Peers(nn.Module):
    """Models that read the same token ids, run as one: their logits stand side by side in the last dimension."""

    def __init__(self, peers: Iterable[PreTrainedModel]) -> None:
        super().__init__()
        self.peers: Any = nn.ModuleList(peers)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Each peer gets what it takes of (batch, tokens) inputs. Returns logits of (…, peers x classes)."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        logits = [choices(peer(**taken(peer, inputs))) for peer in self.peers]
        return SequenceClassifierOutput(logits=torch.cat(logits, dim=-1))

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        for peer in self.peers:
            peer.gradient_checkpointing_enable(**options)


class PeerTerm(Term):
    """A term for one of several peers, whose logits stand side by side.

    One that needs a teacher hears each of the other peers, as they are at this step, and is their mean.

    Args:
        term: On logits alone.
        number: the peer's, counted from 0.
        peers: how many there are.
    """

    needs_teacher = False
    needs_logits = True

    def __init__(self, term: Term, number: int, peers: int) -> None:
        super().__init__()
        self.term, self.number, self.peers, self.everywhere = term, number, peers, term.everywhere

    def count(self, batch: Batch) -> Tensor:
        return self.term.count(batch)

    def forward(self, student: Outputs, teacher: Any, batch: Batch, num_items: Tensor) -> Tensor:
        said = [replace(student, logits=logits) for logits in student.logits.chunk(self.peers, dim=-1)]
        own = said.pop(self.number)
        if not self.term.needs_teacher:
            return self.term(own, None, batch, num_items)
        heard = [replace(other, logits=other.logits.detach()) for other in said]
        return torch.stack([self.term(own, other, batch, num_items) for other in heard]).mean()


class MutualTrainer(ObjectiveTrainer):
    """Trains peers side by side.

    All of them take a step at once, on what they said before it; in the paper they take turns. Gradients are clipped
    peer by peer. Terms and metrics are logged for each peer, by its number.

    Args:
        peers: Models of one task that read the same token ids; the seed draws what is new in them.
        args: The weights, and every flag of `transformers.TrainingArguments`.
        kwargs: As for `transformers.Trainer`; the functions for metrics are those for one model.

    Raises:
        InputError: As `ObjectiveTrainer`. Or the peers' predictions cannot be compared. Or there are FSDP or DeepSpeed
            to shard them.

    Reference:
        Zhang et al., Deep Mutual Learning, arXiv:1706.00384.
    """

    processing_class: Any

    def __init__(self, peers: Sequence[PreTrainedModel], args: MutualArguments, **kwargs: Any) -> None:
        self.peers: list[Any] = list(peers)
        if (predict := kwargs.get("preprocess_logits_for_metrics")) is not None:
            kwargs["preprocess_logits_for_metrics"] = self._each_predicts(predict)
        if (measure := kwargs.get("compute_metrics")) is not None:
            kwargs["compute_metrics"] = self._each_is_measured(measure)
        model: Any = Peers(self.peers)
        super().__init__(model, args, lambda: mutual_objective(self.peers, args), **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("peers learn in one process or under DDP, not with FSDP or DeepSpeed")

    def save_peers(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Write each peer, with its tokenizer, to `folder/peer-1` and so on."""
        if self.is_world_process_zero():
            for number, peer in enumerate(self.peers, start=1):
                peer.save_pretrained(folder / f"peer-{number}")
                tokenizer_for(peer, tokenizer).save_pretrained(folder / f"peer-{number}")
        self.accelerator.wait_for_everyone()

    def keep_best(self, metrics: Mapping[str, float]) -> int:
        """Leave all but one of the peers: that with the smallest loss on the labels, of what `evaluate` returned.

        From here on the trainer's model is that peer. Returns its number.
        """
        number = min(range(len(self.peers)), key=lambda peer: metrics[f"eval_loss_hard_label_{peer + 1}"])
        self.model = self.peers[number]
        self.processing_class = tokenizer_for(self.model, self.processing_class)
        return number + 1

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.accelerator.unscale_gradients()
        limit = self.args.max_grad_norm
        return torch.stack([nn.utils.clip_grad_norm_(peer.parameters(), limit) for peer in self.peers]).norm()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None and isinstance(self.model, Peers):
            # Copies: tensors that a peer ties together cannot be written as one.
            state_dict = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        super()._save(output_dir, state_dict)

    def _each_predicts(self, predict: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        """(…, peers): what `predict` makes of each peer's logits."""
        count = len(self.peers)
        return lambda logits, labels: torch.stack([predict(each, labels) for each in logits.chunk(count, -1)], -1)

    def _each_is_measured(self, measure: Callable[[Any], dict[str, float]]) -> Callable[[Any], dict[str, float]]:
        def measure_each(evaluation: Any) -> dict[str, float]:
            found: dict[str, float] = {}
            for number in range(len(self.peers)):
                metrics = measure(EvalPrediction(evaluation.predictions[..., number], evaluation.label_ids))
                found |= {f"{name}_{number + 1}": value for name, value in metrics.items()}
            return found

        return measure_each


def mutual_objective(peers: Sequence[PreTrainedModel], arguments: MutualArguments) -> Objective:
    """Each peer's terms, by names that end in its number, counted from 1.

    Raises:
        InputError: What the peers predict cannot be compared.
    """
    for other in peers[1:]:
        check_same_vocabulary(other, peers[0])
        check_same_classes(other, peers[0], arguments)
    terms: dict[str, Term] = {}
    softened = []
    for number in range(len(peers)):
        soft_target = soft_target_term(arguments, arguments.soft_target_loss, arguments.soft_target_top_k)
        softened.append(soft_target.loss)
        each = {"soft_target": soft_target, "hard_label": HardLabelTerm(arguments.label_smoothing_factor)}
        terms |= {f"{name}_{number + 1}": PeerTerm(term, number, len(peers)) for name, term in each.items()}
    weights = {name: arguments.term_weights[name.rpartition("_")[0]] for name in terms}
    schedules = [each for schedule in arguments.read_schedules for each in _of_each_peer(schedule, len(peers))]
    objective = Objective(terms, weights, {}, {}, schedules=schedules, softened=softened)
    return objective.to(torch.promote_types(peers[0].dtype, torch.float32))


def _of_each_peer(schedule: Schedule, peers: int) -> list[Schedule]:
    """A term's weight moves for each peer; the temperature is one for all."""
    if schedule.name == "temperature":
        return [schedule]
    term = schedule.name.removesuffix("_weight")
    return [replace(schedule, name=f"{term}_{number}_weight") for number in range(1, peers + 1)]


def load_peers(arguments: PeerArguments, task: Task) -> tuple[list[PreTrainedModel], Tokenizer]:
    """The peers that the flags name, and the tokenizer of all.

    Raises:
        InputError: A checkpoint or configuration that cannot be used, or peers that read other token ids.
    """
    named: list[tuple[str | None, str | None]] = [(name, None) for name in arguments.peer_name_or_path]
    named += [(None, config) for config in arguments.peer_config]
    first = load_or_start(*named[0], arguments.tokenizer_name_or_path, task)
    if first.model.config.is_encoder_decoder:
        raise InputError("encoder-decoders do not learn from one another here: give encoders or decoders")
    if (kind := problem_type(first.model)) in (MULTI_LABEL, REGRESSION):
        raise InputError(f"peers learn to choose one label, and {kind} is something else: distil from a teacher")
    peers = [first.model]
    for name, config in named[1:]:
        peers.append(companion(name, config, peers, task, first.tokenizer))
    return peers, first.tokenizer
