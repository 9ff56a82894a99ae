"""The trainer that all ways of compressing share: it drives a list of methods, alone or together."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from prunelle.compression import CompressionMethod
from prunelle.errors import InputError
from prunelle.losses import HardLabelLoss, LogitMSELoss
from prunelle.tasks import choices
from prunelle.trainers.arguments import FinetuningArguments
from prunelle.trainers.models import disable_dropout, frozen_parameters

METHODS = "compression.safetensors"


def hard_label_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, label_smoothing: float = 0.0
) -> torch.Tensor:
    """The labels' cross-entropy, summed and divided by the labels of the whole accumulated batch.

    Where each label is a choice of its own, it is the binary one; where labels are numbers, the squared error.
    The classifiers' own loss is a mean over one micro-batch, which the Trainer then takes for a share of the whole:
    accumulated steps and processes would multiply it.
    """
    if labels.is_floating_point():
        return LogitMSELoss()(choices(outputs), labels[:, None], num_items_in_batch)
    logits = choices(outputs)
    if logits.shape == labels.shape:
        logits = choices(outputs, multi_label=True)
    return HardLabelLoss(label_smoothing)(logits.flatten(0, -2), labels.flatten(), num_items_in_batch)


class CompressionTrainer(Trainer):
    """`transformers.Trainer` that learns from labels while compression methods change what the weights are.

    Methods are attached before anything is loaded, brought up to date after every optimizer step, asked for
    penalties and for what the optimizer is to train otherwise, saved with every checkpoint and, at the end, for
    whether they are where they were to end. The loss is `hard_label_loss`; subclasses have others.

    Args:
        model: What is compressed, in place.
        args: Every flag of `transformers.TrainingArguments`; `bf16` and `fp16` compute in half precision, and what is
            trained has float32 or more.
        methods: Attached in this order: a weight is masked before it is quantized.
        kwargs: As for `transformers.Trainer`.

    Raises:
        InputError: A method, or a pattern of `frozen_modules`, finds not what it looks for; several GPUs in one
            process; or methods, and FSDP or DeepSpeed to shard what they parametrize.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        methods: Sequence[CompressionMethod] = (),
        **kwargs: Any,
    ) -> None:
        if any(parameter.element_size() < 4 for parameter in model.parameters()):
            model.float()  # as a checkpoint holds them, half of the digits would round small steps away
        loss = partial(hard_label_loss, label_smoothing=args.label_smoothing_factor)
        super().__init__(model=model, args=args, **({"compute_loss_func": loss} | kwargs))
        # Labels stand where their logits do, a causal language model's too: all of them count.
        self._loss_shifts_labels = False
        if args.n_gpu > 1:
            raise InputError(f"{args.n_gpu} GPUs and one process: start one process a GPU with `accelerate launch`")
        if isinstance(args, FinetuningArguments):
            if args.disable_dropout:
                disable_dropout(model)
            for parameter in frozen_parameters(model, args.frozen_modules):
                parameter.requires_grad_(False)
        self.methods = list(methods)
        if not self.methods:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("weights are compressed in one process or under DDP, not with FSDP or DeepSpeed")
        if args.load_best_model_at_end:
            raise InputError(
                "--load_best_model_at_end would bring back a model from before the compression was complete: "
                "leave it out"
            )
        for method in self.methods:
            method.attach(model)
        self.add_callback(_Steps(self))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The labels' loss and, in training, the methods' penalties."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss + self.penalty()
        return (loss, outputs) if return_outputs else loss

    def penalty(self) -> Tensor | float:
        """The methods' penalties, as one micro-batch's share: over an accumulated batch they count once."""
        return sum(method.penalty() for method in self.methods) / self.current_gradient_accumulation_steps

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The model's optimizer, with what the methods learn in groups of its own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and (groups := [group for method in self.methods for group in method.parameter_groups()]):
            apart = {id(parameter) for group in groups for parameter in group["params"]}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
            for group in groups:
                optimizer.add_param_group(group)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate's schedule; that of a shorter run, gone through again, where a method says so.

        Raises:
            InputError: It has to be gone through again, and is no function of the step.
        """
        places = next(filter(None, (method.learning_rate_steps(num_training_steps) for method in self.methods)), None)
        if places is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(max(places) + 1, optimizer)
        if not isinstance(scheduler, LambdaLR):
            raise InputError(
                f"--lr_scheduler_type {self.args.lr_scheduler_type} cannot be rewound: give linear, or cosine"
            )

        def rewound(rate: Callable[[int], float]) -> Callable[[int], float]:
            return lambda step: rate(places[min(step, num_training_steps - 1)])

        scheduler.lr_lambdas = [rewound(rate) for rate in scheduler.lr_lambdas]
        return scheduler

    def unwrapped_model(self) -> Any:
        """What was trained, no longer distributed or computing in half precision: to save and measure, not to train."""
        model = self.accelerator.unwrap_model(self.model)
        # Accelerate's own way to take autocast off takes the decorators of transformers off with it.
        if vars(model).pop("_original_forward", None) is not None:
            del model.forward
        return model

    def run_on_examples(self, samples: int, after_batch: Callable[[], None] | None) -> None:
        """Compute the loss on training examples drawn at random, batch by batch, and train nothing.

        Every process takes all of them, so that all see the same.

        Args:
            samples: how many.
            after_batch: called while the batch's gradients are there; None for none.
        """
        drawn = torch.randperm(len(self.train_dataset), generator=torch.Generator().manual_seed(self.args.seed))
        examples = Subset(self.train_dataset, drawn[:samples].tolist())
        self.model.eval()
        for batch in DataLoader(examples, self.args.per_device_train_batch_size, collate_fn=self.data_collator):
            with torch.set_grad_enabled(after_batch is not None), self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, self._prepare_inputs(batch))
            if after_batch is not None:
                loss.backward()
                after_batch()
                self.model.zero_grad()
        self.model.train()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the methods' metrics to the training loss's log line."""
        if "loss" in logs:
            for method in self.methods:
                logs |= method.metrics()
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.methods and self.args.should_save:
            states = {f"{n}.{k}": v for n, method in enumerate(self.methods) for k, v in method.state_dict().items()}
            save_file(states, Path(output_dir) / METHODS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Before the weights, which the methods of another run would not let in.
        if self.methods:
            if not (file := Path(resume_from_checkpoint) / METHODS).is_file():
                raise InputError(f"{resume_from_checkpoint} holds no {METHODS}: it was trained without compression")
            states = load_file(file)
            if {key.partition(".")[0] for key in states} - {str(number) for number in range(len(self.methods))}:
                raise InputError(f"{resume_from_checkpoint} was compressed in more ways than this run: resume with all")
            for number, method in enumerate(self.methods):
                prefix = f"{number}."
                method.load_state_dict({k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)})
        super()._load_from_checkpoint(resume_from_checkpoint, model)


class _Steps(TrainerCallback):
    """Tells the methods how far the run is. After a step they are told before it is logged, evaluated or saved."""

    def __init__(self, trainer: CompressionTrainer) -> None:
        self.trainer = trainer
        self.gradients_checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for method in self.trainer.methods:
            method.start(state.max_steps)
            if not state.global_step:
                method.calibrate(self.trainer.model, self.trainer.run_on_examples)
        self._step(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients_checked:
            for method in self.trainer.methods:
                method.check_gradients()
            self.gradients_checked = True
        for method in self.trainer.methods:
            method.observe()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for method in self.trainer.methods:
            method.finish()

    def _step(self, state: Any) -> None:
        for method in self.trainer.methods:
            method.step(state.global_step / max(1, state.max_steps))
