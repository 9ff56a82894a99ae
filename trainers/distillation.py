"""Distillation: the student learns from labels and from what its teacher says, inside and out."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression import CompressionMethod
from prunelle.errors import InputError
from prunelle.tasks.several_tokenizers import TEACHER
from prunelle.trainers.arguments import DistillationArguments, PredictionArguments
from prunelle.trainers.cached_answers import PREFIX, cache_answers
from prunelle.trainers.compression import CompressionTrainer
from prunelle.trainers.ensemble import input_names
from prunelle.trainers.models import frozen_parameters
from prunelle.trainers.objective import Objective, build_objective
from prunelle.trainers.terms import Outputs, SoftTargets, asked_positions, batch_of

PROJECTIONS = "projections.safetensors"
POSITIONS = "distilled_positions"


class ObjectiveTrainer(CompressionTrainer):
    """`transformers.Trainer` whose loss is an objective: the weighted sum of named terms.

    Each term is divided by the number of items it runs over in the whole accumulated batch on all processes, so that
    accumulation and the number of processes do not change the gradient. Each is logged by name, as its mean over the
    items seen since the last log; with several processes the evaluation's means count the few examples twice that
    fill up the last batch.

    Projections of hidden states belong to the objective, not to the model. The optimizer trains them as it does
    the model's weights, gradients are clipped together, and a checkpoint keeps them in a file of their own. They
    are not wrapped by DDP, so their gradients are averaged over the processes once a step, as DDP does the
    model's.

    Args:
        model: What learns.
        args: Every flag of `transformers.TrainingArguments`.
        objective: Makes it, once the Trainer has set the seed: random projections begin alike in all processes.
        methods: What is done to the model's weights in the same run.
        kwargs: As for `transformers.Trainer`.

    Raises:
        InputError: As `CompressionTrainer` and the making of the objective. Or there are projections, and FSDP or
            DeepSpeed to shard what is trained.
    """

    data_collator: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: PredictionArguments,
        objective: Callable[[], Objective],
        methods: Sequence[CompressionMethod] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, methods, **kwargs)
        self.objective = objective().to(args.device)
        self.projections = list(self.objective.parameters())
        if self.projections and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise InputError("--hidden_projection is learned in one process or under DDP, not with FSDP or DeepSpeed")
        # The loss below is divided by the items of the whole accumulated batch: the Trainer counts them, and
        # must not divide by the number of accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        if self.objective.needs_logits:
            self.data_collator = WithPositions(self.data_collator, self.objective.everywhere)
            # Each process collates its own batches, a stream's too: positions cannot be cut up as a batch's rows can.
            self.accelerator.dataloader_config.dispatch_batches = False
        self.means = {"train": TermMeans(), "eval": TermMeans()}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, and how many items each term runs over in them, on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # A step begins. The Trainer has cleared the gradients of the student alone.
        self.objective.zero_grad()
        self.objective.move(self.state.global_step / max(1, self.state.max_steps))
        if not batches:
            return batches, None
        counts = torch.stack([self.objective.count(batch_of(batch)) for batch in batches]).sum(0).to(device)
        if self._averages_over_processes:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; after the last of a step, the projections' gradients are averaged over the processes."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for projection in self.projections:
                projection.grad = self.accelerator.reduce(projection.grad, reduction="mean")
        return loss

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
        features = {
            name: value
            for name, value in inputs.items()
            if name not in ("labels", POSITIONS) and not name.startswith((PREFIX, TEACHER))
        }
        batch, training = batch_of(inputs), model.training
        positions = inputs[POSITIONS] if POSITIONS in inputs else self.objective.positions(batch)
        teacher = self.ask(inputs, positions)

        own_items = self.objective.count(batch)
        items = num_items_in_batch if training else own_items
        loss, terms, logits = self.objective(model, features, teacher, batch, positions, items, return_outputs)

        means = self.means["train" if training else "eval"]
        for (name, term), total, own in zip(terms.items(), items, own_items, strict=True):
            means.add(name, term * total, own)

        if training and self._averages_over_processes:
            # Each process holds its share of the sum, and DDP averages the shares' gradients.
            loss = loss * self.accelerator.num_processes
        if training and self.accelerator.num_processes > 1 and not self.objective.needs_logits:
            # DDP waits for the gradients of the head too, and what hooks catch is none of the outputs it knows of.
            loss = loss + 0.0 * logits.sum()
        if training:
            loss = loss + self.penalty()
        return (loss, {"logits": logits}) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The student's optimizer, with the projections beside its weights."""
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if new := [projection for projection in self.projections if id(projection) not in known]:
            optimizer.add_param_group({"params": new, "weight_decay": self.args.weight_decay})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each term's mean to the training loss's log line, and where weights and temperature stand that move."""
        if "loss" in logs:
            terms = self.means["train"].pop(self.accelerator)
            logs |= {f"loss_{name}": value for name, value in terms.items()} | self.objective.moved
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Adds each term's mean, and makes the loss their weighted sum: exact where batches are uneven."""
        self.means["eval"] = TermMeans()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        terms = self.means["eval"].pop(self.accelerator)
        output.metrics[f"{prefix}_loss"] = sum(self.objective.weights[name] * value for name, value in terms.items())
        output.metrics.update({f"{prefix}_loss_{name}": value for name, value in terms.items()})
        return output

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(nn.ModuleList([model, self.objective]) if self.projections else model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.projections and self.args.should_save:
            save_file(self.objective.state_dict(), Path(output_dir) / PROJECTIONS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.projections:
            if not (file := Path(checkpoint) / PROJECTIONS).is_file():
                raise InputError(f"{checkpoint} holds no {PROJECTIONS}: it was trained without --hidden_projection")
            self.objective.load_state_dict(load_file(file))
        super()._load_optimizer_and_scheduler(checkpoint)

    @property
    def _averages_over_processes(self) -> bool:
        return self.args.average_tokens_across_devices and self.accelerator.num_processes > 1

    def ask(self, inputs: dict[str, Any], positions: Tensor) -> Outputs | SoftTargets | None:
        """What a teacher says about a batch; None where there is none."""
        return None


class DistillationTrainer(ObjectiveTrainer):
    """Trains a student on the terms that the arguments ask for.

    The teacher stays an attribute: it is moved to the device (under FSDP2 it is sharded as the student is), evaluated
    without gradients, and neither wrapped into the student nor saved with it.

    Args:
        model: The student.
        teacher: A model with the student's head: the same classes or the same vocabulary; `OwnTokens` of one, or an
            `Ensemble` of them.
        args: The weights, and every flag of `transformers.TrainingArguments`.
        methods: What is done to the student's weights in the same run.
        teacher_folders: The teacher's checkpoint, or those of an ensemble, by which `--teacher_cache` tells them apart.
        kwargs: As for `transformers.Trainer`.

    Raises:
        InputError: As `ObjectiveTrainer`. Or the two cannot be compared; see `build_objective`. Or the cache is one of
            another teacher, of other data or settings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: nn.Module,
        args: DistillationArguments,
        methods: Sequence[CompressionMethod] = (),
        teacher_folders: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        def objective() -> Objective:
            nonlocal teacher
            if args.teacher_dtype is not None or self.accelerator.is_fsdp2:
                # A copy: the teacher itself is measured against the student after training, as it was given.
                teacher = copy.deepcopy(teacher)
            if args.teacher_dtype is not None:
                teacher = teacher.to(getattr(torch, args.teacher_dtype))
            return build_objective(model, teacher, args)

        super().__init__(model, args, objective, methods, **kwargs)
        self.teacher_inputs = input_names(teacher)
        self._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.teacher_inputs if name.startswith(TEACHER)]
        self.teacher: nn.Module | None = None
        if self.objective.needs_teacher:
            teacher.eval().requires_grad_(False)
            if args.teacher_cache is not None:
                cache_answers(self, teacher, teacher_folders)
            else:
                self.teacher = prepare_teacher(self.accelerator, teacher)

    def ask(self, inputs: dict[str, Any], positions: Tensor) -> Outputs | SoftTargets | None:
        """What the teacher says about a batch, or has said, where its answers are cached."""
        if answers := {name.removeprefix(PREFIX): inputs[name] for name in inputs if name.startswith(PREFIX)}:
            return SoftTargets(answers)
        if self.teacher is None:
            return None
        accepted = {name: value for name, value in inputs.items() if name in self.teacher_inputs}
        with self.teacher_precision():
            return self.objective.ask(self.teacher, accepted, positions)

    def teacher_precision(self) -> Any:
        """What the teacher computes in: its own, where `--teacher_dtype` says which, else what the student does."""
        return nullcontext() if self.args.teacher_dtype is not None else self.accelerator.autocast()


class WithPositions:
    """Collator that adds where a batch asks for logits: to find out on a GPU would be to wait for it."""

    def __init__(self, collator: Callable[[Any], Any], everywhere: bool) -> None:
        self.collator, self.everywhere = collator, everywhere

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = self.collator(examples)
        return {**batch, POSITIONS: asked_positions(batch_of(batch), self.everywhere)}


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


def prepare_teacher(accelerator: Accelerator, teacher: nn.Module) -> nn.Module:
    """The teacher where the student is trained: under FSDP2 sharded likewise, else whole in each process."""
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        settings = dict(vars(plugin))
        sharded = fsdp2_prepare_model(accelerator, teacher)
        vars(plugin).update(settings)  # in which the names of the teacher's layers would stand in for the student's
        return sharded
    return teacher.to(accelerator.device)


def check_pair(student: PreTrainedModel, teacher: nn.Module, arguments: DistillationArguments) -> None:
    """See that a student and a teacher can be compared as the arguments ask, before anything is trained.

    Raises:
        InputError: They cannot; see `build_objective`. Or what is to be frozen is not there.
    """
    frozen_parameters(student, arguments.frozen_modules)
    build_objective(student, teacher, arguments)


def check_unlabeled(unlabeled_file: str | None, arguments: DistillationArguments) -> None:
    """See that the loss has something to say about examples without a label, where there are any.

    Raises:
        InputError: No term listens to the teacher, or the soft targets need a label.
    """
    if unlabeled_file is None:
        return
    if arguments.wanted_terms == ["hard_label"]:
        raise InputError(
            "--unlabeled_file is for the teacher to speak on, but every weight except --hard_label_weight is 0: "
            "give --soft_target_weight, or leave the file out"
        )
    if "soft_target" in arguments.wanted_terms and arguments.soft_target_loss == "decoupled":
        raise InputError(
            "--soft_target_loss decoupled needs the label of every example: with --unlabeled_file give another, "
            "such as forward_kl"
        )
