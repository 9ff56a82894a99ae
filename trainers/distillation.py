"""Distillation: the student learns from labels, from the teacher's distribution and from its hidden states."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from prunelle.errors import InputError
from prunelle.losses import HardLabelLoss, HiddenCosineLoss, SoftTargetLoss
from prunelle.trainers.arguments import FinetuningArguments

IGNORED = -100


@dataclass
class DistillationArguments(FinetuningArguments):
    """How the student is trained. The defaults are DistilBERT's (arXiv:1910.01108)."""

    soft_target_weight: float = field(
        default=5.0, metadata={"help": "Weight of the divergence from the teacher's distribution."}
    )
    hard_label_weight: float = field(default=2.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    hidden_cosine_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cosine between last hidden states; wants equal hidden sizes."}
    )
    temperature: float = field(default=2.0, metadata={"help": "Softens both distributions of the soft targets."})
    distilled_positions: Literal["masked", "all"] = field(
        default="masked", metadata={"help": "Where a masked LM learns the teacher's distribution."}
    )

    def __post_init__(self) -> None:
        weights = {f"{name}_weight": weight for name, weight in self.term_weights.items()}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise InputError(f"--{name} {weight} must not be negative")
        if not any(weights.values()):
            raise InputError(f"{', '.join('--' + name for name in weights)} are all 0: nothing would be learned")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature} must be above 0")
        super().__post_init__()

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each loss term, by the name it is logged under."""
        return {
            "soft_target": self.soft_target_weight,
            "hard_label": self.hard_label_weight,
            "hidden_cosine": self.hidden_cosine_weight,
        }


class DistillationTrainer(Trainer):
    """`transformers.Trainer` whose loss is the weighted sum of soft-target, hard-label and hidden-cosine terms.

    The teacher stays an attribute: it is moved to the device, evaluated without gradients, and neither wrapped
    into the student nor saved with it. Each term is divided by the number of items it runs over in the whole
    accumulated batch on all processes, so that accumulation and the number of processes do not change the
    gradient. Each is logged by name, as its mean over the items seen since the last log; with several processes
    the evaluation's means count the few examples twice that fill up the last batch.

    Args:
        model: The student.
        teacher: A model with the student's head: the same classes or the same vocabulary.
        args: The weights, and every flag of `transformers.TrainingArguments`.
        kwargs: As for `transformers.Trainer`.

    Raises:
        InputError: The two cannot be compared; see `check_pair`.
    """

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel, args: DistillationArguments, **kwargs: Any
    ) -> None:
        check_pair(model, teacher, args)
        super().__init__(model=model, args=args, **kwargs)
        if args.n_gpu > 1:
            raise InputError(f"{args.n_gpu} GPUs and one process: start one process a GPU with `accelerate launch`")
        # The loss below is divided by the items of the whole accumulated batch: the Trainer counts them, and
        # must not divide by the number of accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.weights = {name: weight for name, weight in args.term_weights.items() if weight}
        self.soft_target = SoftTargetLoss(args.temperature)
        self.hard_label = HardLabelLoss()
        self.hidden_cosine = HiddenCosineLoss()
        self.teacher_inputs = set(inspect.signature(teacher.forward).parameters)
        self.teacher: nn.Module | None = None
        if self.weights.keys() - {"hard_label"}:
            teacher.eval().requires_grad_(False)
            self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self.means = {"train": TermMeans(), "eval": TermMeans()}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, and how many items each term runs over in them, on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = torch.stack([self._count_items(batch) for batch in batches]).sum(0).to(device)
        if self._averages_over_processes:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the terms.

        `num_items_in_batch` is what `get_batch_samples` counted; in evaluation each batch counts for itself.
        """
        features = {name: value for name, value in inputs.items() if name != "labels"}
        labels, mask = inputs["labels"], inputs["attention_mask"]
        hidden = {"output_hidden_states": True} if "hidden_cosine" in self.weights else {}

        student = model(**features, **hidden)
        if self.teacher is not None:
            with torch.no_grad():
                accepted = {name: value for name, value in features.items() if name in self.teacher_inputs}
                teacher = self.teacher(**accepted, **hidden)

        own_items = dict(zip(self.weights, self._count_items(inputs), strict=True))
        training = model.training
        items = dict(zip(self.weights, num_items_in_batch, strict=True)) if training else own_items

        terms: dict[str, Tensor] = {}
        if "soft_target" in self.weights:
            chosen = self._distilled(labels, mask)
            terms["soft_target"] = self.soft_target(
                student.logits[chosen], teacher.logits[chosen], items["soft_target"]
            )
        if "hard_label" in self.weights:
            rows = student.logits.flatten(0, -2)
            terms["hard_label"] = self.hard_label(rows, labels.flatten(), items["hard_label"])
        if "hidden_cosine" in self.weights:
            terms["hidden_cosine"] = self.hidden_cosine(
                student.hidden_states[-1], teacher.hidden_states[-1], mask, items["hidden_cosine"]
            )

        means = self.means["train" if training else "eval"]
        for name, term in terms.items():
            means.add(name, term.detach() * items[name], own_items[name])

        loss = sum(self.weights[name] * term for name, term in terms.items())
        if training and self._averages_over_processes:
            # Each process holds its share of the sum, and DDP averages the shares' gradients.
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": student.logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each term's mean to the training loss's log line."""
        if "loss" in logs:
            terms = self.means["train"].pop(self.accelerator)
            logs |= {f"loss_{name}": value for name, value in terms.items()}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Adds each term's mean, and makes the loss their weighted sum: exact where batches are uneven."""
        self.means["eval"] = TermMeans()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        terms = self.means["eval"].pop(self.accelerator)
        output.metrics[f"{prefix}_loss"] = sum(self.weights[name] * value for name, value in terms.items())
        output.metrics.update({f"{prefix}_loss_{name}": value for name, value in terms.items()})
        return output

    @property
    def _averages_over_processes(self) -> bool:
        return self.args.average_tokens_across_devices and self.accelerator.num_processes > 1

    def _count_items(self, inputs: dict[str, Any]) -> Tensor:
        """(terms,) how many items each term, in the order of `weights`, runs over in one batch."""
        labels, mask = inputs["labels"], inputs["attention_mask"]
        counts = {
            "soft_target": lambda: self._distilled(labels, mask).sum(),
            "hard_label": lambda: labels.ne(IGNORED).sum(),
            "hidden_cosine": lambda: mask.sum(),
        }
        return torch.stack([counts[name]() for name in self.weights])

    def _distilled(self, labels: Tensor, mask: Tensor) -> Tensor:
        """Where the student learns the teacher's distribution: bool, shaped like the labels."""
        if labels.dim() == 1 or self.args.distilled_positions == "masked":
            return labels.ne(IGNORED)
        return mask.bool()


class TermMeans:
    """Sums and counts of named terms, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = defaultdict(int)
        self.counts: dict[str, Any] = defaultdict(int)

    def add(self, name: str, total: Tensor, count: Tensor) -> None:
        self.sums[name] += total
        self.counts[name] += count

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Each term's mean over the items of all processes since the last call."""
        if not self.sums:
            return {}
        pairs = torch.stack([torch.stack([self.sums[n].float(), self.counts[n].float()]) for n in self.sums])
        pairs = accelerator.reduce(pairs, reduction="sum")
        means = {
            name: (total / max(count, 1.0)) for name, (total, count) in zip(self.sums, pairs.tolist(), strict=True)
        }
        self.sums.clear()
        self.counts.clear()
        return means


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel, arguments: DistillationArguments) -> None:
    """See that a student's and a teacher's outputs can be compared, before anything is trained.

    Raises:
        InputError: They differ in vocabulary or classes, or in hidden size where hidden states are compared.
    """
    ours, theirs = student.config, teacher.config
    if ours.vocab_size != theirs.vocab_size:
        raise InputError(
            f"the student's vocabulary has {ours.vocab_size} tokens and the teacher's {theirs.vocab_size}: "
            "both must read the same token ids"
        )
    if student.get_output_embeddings() is None and ours.num_labels != theirs.num_labels:
        raise InputError(f"the student has {ours.num_labels} classes and the teacher {theirs.num_labels}")
    if arguments.hidden_cosine_weight and ours.hidden_size != theirs.hidden_size:
        raise InputError(
            f"the student's hidden size is {ours.hidden_size} and the teacher's {theirs.hidden_size}: their cosine "
            "is not defined; give --hidden_cosine_weight 0"
        )
