"""Fine-tuning on labels alone, of a teacher or any other model; and teachers as the flags name them."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.compression.record import fingerprint, read_record, write_record
from prunelle.compression.sparse import store_sparse
from prunelle.errors import InputError
from prunelle.tasks import (
    AnyTokens,
    OtherTokensCollator,
    QuestionAnswering,
    ReadsLogits,
    Task,
    TokenClassification,
)
from prunelle.trainers.arguments import DistillationArguments, FinetuningArguments
from prunelle.trainers.compression import CompressionTrainer
from prunelle.trainers.ensemble import Ensemble, members
from prunelle.trainers.models import (
    LoadedModel,
    TeacherStudentArguments,
    load_model,
    load_or_start,
    student_tokenizer,
    trim_vocabularies,
)
from prunelle.trainers.own_tokens import OwnTokens, Readers
from prunelle.trainers.teacher_cache import is_complete_for

logger = logging.getLogger(__name__)

# Beside the batch over all processes: what makes another model of the same data.
SETTINGS_THAT_TRAIN = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "disable_dropout",
    "frozen_modules",
    "train_sampling_strategy",
    "fp16",
    "bf16",
    "seed",
    "data_seed",
)


def trainer_data(
    task: Task, tokenizer: Tokenizer, encoded: dict[str, Any], others: Mapping[str, Tokenizer] | None = None
) -> dict[str, Any]:
    """What a `Trainer` wants of a task: data, collator, tokenizer and metrics, as keyword arguments.

    It trains on what is unlabeled too, where `encoded` has that.

    Args:
        others: the tokenizers of teachers that read their own tokens, as `tasks.AnyTokens` takes them.
    """
    collator = task.collator(tokenizer, encoded)

    def predicted(logits: Any, labels: Any) -> torch.Tensor:
        # The Trainer keeps what this returns of every batch: classes, not logits over a vocabulary.
        if isinstance(logits, tuple):
            logits = torch.stack(logits[:2], dim=1) if isinstance(task, QuestionAnswering) else logits[0]
        return logits if isinstance(task, ReadsLogits) else logits.argmax(-1)

    def compute_metrics(evaluation: Any) -> dict[str, float]:
        if isinstance(task, ReadsLogits):
            return task.read(evaluation.predictions, encoded["validation"], "validation").metrics
        return task.compute_metrics(evaluation.predictions, evaluation.label_ids)

    train, unlabeled = encoded["train"], encoded.get("unlabeled")
    return {
        "train_dataset": train if unlabeled is None else datasets.concatenate_datasets([train, unlabeled]),
        "eval_dataset": encoded["validation"],
        "data_collator": OtherTokensCollator(collator, tokenizer, others) if others else collator,
        "callbacks": [collator] if isinstance(collator, TrainerCallback) else [],
        "processing_class": tokenizer,
        "preprocess_logits_for_metrics": predicted,
        "compute_metrics": compute_metrics,
    }


def save_model(trainer: Trainer, folder: Path, sparse: bool = False) -> None:
    """Write the trained model, its zeros or not, and its tokenizer, once, without the Trainer's pickled arguments."""
    trainer.save_model(str(folder), _internal_call=True)  # which does not push: more comes into the folder
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)
        if sparse:
            store_sparse(folder)
    trainer.accelerator.wait_for_everyone()


def save_with_record(trainer: Trainer, folder: Path, **record: Any) -> None:
    """Write the trained model, and when all of it is there `compression.json`.

    Args:
        record: What that says. An `identity` is in the folder before the model is: where the run is killed in between,
            the next one knows its own and makes it anew.
    """
    if trainer.is_world_process_zero() and "identity" in record:
        write_record(folder, identity=record["identity"], unfinished=True)
    save_model(trainer, folder)
    if trainer.is_world_process_zero():
        write_record(folder, **record)
    trainer.accelerator.wait_for_everyone()


@dataclass
class Teacher(LoadedModel):
    """A teacher, the folder that keeps it, and, while it has to be trained, how and from what.

    Several are one model, an `Ensemble`, kept in no one folder. The tokenizer is the student's.

    Attributes:
        others: the tokenizers of teachers that read their own tokens, as `tasks.AnyTokens` takes them.
    """

    folder: str | None = None
    plan: FinetuningArguments | None = None
    identity: str | None = None
    others: Mapping[str, Tokenizer] = field(default_factory=dict)

    def encode(self, task: Task) -> dict[str, Any]:
        """The task's splits, as the student reads them and the teachers."""
        return task.encode(self.tokenizer, self.others) if isinstance(task, AnyTokens) else task.encode(self.tokenizer)

    @property
    def folders(self) -> list[str]:
        """Of each teacher, its checkpoint."""
        return [self.folder] if self.folder is not None else [each.name_or_path for each in members(self.model)]

    @property
    def is_loaded(self) -> bool:
        """Whether it has its weights, which nobody needs where all of its answers are cached."""
        return not any(parameter.is_meta for parameter in self.model.parameters())


def load_teacher(models: TeacherStudentArguments, task: Task, arguments: DistillationArguments) -> Teacher:
    """The teachers that the flags name; of a bare one, what an earlier run fine-tuned, where there is that.

    Raises:
        InputError: One has no trained head and must not be fine-tuned, or the folder for the fine-tuned
            teacher holds something else. Or several do not make one; see `load_ensemble`.
    """
    names = models.teacher_name_or_path or []
    name, others = next(iter(names), None), names[1:]
    source = name or str(models.teacher_config)
    weights = _needs_weights(names, models, arguments)
    loaded = load_or_start(name, models.teacher_config, models.tokenizer_name_or_path, task, weights)
    readers = Readers(student_tokenizer(models, loaded.tokenizer), task)
    if loaded.is_trained:
        every = [loaded, *_load_others(others, task, weights)]
        heard = [readers.fit(each.model, each.tokenizer) for each in every]
        model = heard[0] if len(heard) == 1 else ensemble(heard, readers.tokenizer, models, arguments)
        teacher = Teacher(model, readers.tokenizer, True, folder=None if others else name)
    elif models.finetune_teacher:
        plan = teacher_arguments(models, arguments)
        folder, identity = str(plan.output_dir), teacher_identity(source, loaded, task, plan)
        found = reusable_teacher(Path(folder), identity, task, _needs_weights([folder], models, arguments))
        model = readers.fit((found or loaded).model, loaded.tokenizer)
        teacher = Teacher(model, readers.tokenizer, found is not None, folder=folder)
        if found is None:
            teacher.plan, teacher.identity = plan, identity
    else:
        raise InputError(f"{source} has no head that was trained for the task: add --finetune_teacher")
    teacher.others = readers.others
    check_own_tokens(teacher, task, models, arguments)
    return teacher


def _needs_weights(folders: Sequence[str], models: TeacherStudentArguments, arguments: DistillationArguments) -> bool:
    """Whether the teachers of these checkpoints still have to speak, or to lend the student their layers."""
    cache = arguments.teacher_cache
    return cache is None or models.student_is_of_the_teacher or not is_complete_for(Path(cache), folders)


def _load_others(names: Sequence[str], task: Task, weights: bool) -> list[LoadedModel]:
    loaded = [load_model(name, task, adopt=False, weights=weights) for name in names]
    for name, each in zip(names, loaded, strict=True):
        if not each.is_trained:
            raise InputError(f"{name} has no head that was trained for the task: train it by scripts/finetune.py")
    return loaded


def ensemble(
    teachers: Sequence[nn.Module],
    tokenizer: Tokenizer,
    models: TeacherStudentArguments,
    arguments: DistillationArguments,
) -> Ensemble:
    """Teachers as one, by the flags that say how.

    Args:
        tokenizer: of those that are not `OwnTokens`.

    Raises:
        InputError: They predict other things than the first.
    """
    trim_vocabularies(tokenizer, *(each for each in teachers if isinstance(each, PreTrainedModel)))
    # The squared error of logits knows no temperature.
    temperature = 1.0 if arguments.soft_target_loss == "mse" else arguments.temperature
    return Ensemble(teachers, models.teacher_weights, models.teacher_mean, temperature)


def check_own_tokens(
    teacher: Teacher, task: Task, models: TeacherStudentArguments, arguments: DistillationArguments
) -> None:
    """See that nothing is asked of teachers with tokens of their own that only one with the student's can answer.

    Raises:
        InputError: It is.
    """
    if not teacher.others:
        return
    if models.generations > 1:
        raise InputError(
            f"--generations {models.generations}: each student teaches the next as the teacher taught it, and this "
            "teacher reads other tokens than the student: distil once, and the generations from that student"
        )
    if isinstance(task, TokenClassification) and arguments.distilled_positions == "all":
        raise InputError(
            "--distilled_positions all: a teacher and a student of other tokens meet at the first token of each word "
            "alone; give masked"
        )


def reusable_teacher(
    folder: Path, identity: str, task: Task, weights: bool = True, flag: str = "teacher_output_dir"
) -> LoadedModel | None:
    """The teacher trained by an earlier run, or None where there is none yet, or one that was not written to its end.

    Args:
        weights: as for `load_model`.
        flag: by which another folder would be given.

    Raises:
        InputError: The folder holds something else; nothing is overwritten.
    """
    record = read_record(folder)
    if record is None and not (folder / "config.json").exists():
        return None
    if record is None or record.get("identity") != identity:
        raise InputError(
            f"{folder} holds another model, or a teacher trained on other data or with other settings: "
            f"give another --{flag}, or remove it"
        )
    if "unfinished" in record:
        logger.info("the teacher in %s was not written to its end: it is trained again", folder)
        return None
    logger.info("the teacher in %s is used again", folder)
    return load_model(str(folder), task, weights=weights)


def teacher_arguments(models: TeacherStudentArguments, arguments: FinetuningArguments) -> FinetuningArguments:
    """The student's training arguments with the teacher's folder, epochs and learning rate."""
    inherited = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(FinetuningArguments) if f.init}
    beside_the_student = f"{str(arguments.output_dir).rstrip('/')}-teacher"
    inherited |= {"output_dir": models.teacher_output_dir or beside_the_student, "resume_from_checkpoint": None}
    inherited |= {"push_to_hub": False, "frozen_modules": []}
    if models.teacher_learning_rate is not None:
        inherited["learning_rate"] = models.teacher_learning_rate
    if models.teacher_num_train_epochs is not None:
        inherited |= {"num_train_epochs": models.teacher_num_train_epochs, "max_steps": -1}
    return FinetuningArguments(**inherited)


def teacher_identity(source: str, loaded: LoadedModel, task: Task, arguments: FinetuningArguments) -> str:
    """A fingerprint of everything that a fine-tuned teacher depends on."""
    return fingerprint(
        source,
        sorted(loaded.tokenizer.get_vocab().items()),
        task.fingerprint(unlabeled=False),
        arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        {name: getattr(arguments, name) for name in SETTINGS_THAT_TRAIN},
    )


def finetune(
    loaded: LoadedModel, task: Task, encoded: dict[str, Any], arguments: FinetuningArguments, **record: Any
) -> None:
    """Train a model on its task's labels, in place, and write it to the output folder.

    Args:
        record: What `compression.json` is to say beside the metrics on the validation data.

    Raises:
        InputError: As `CompressionTrainer`, of which this is the run without methods.
    """
    folder = Path(str(arguments.output_dir))
    labelled = {split: rows for split, rows in encoded.items() if split != "unlabeled"}
    data = trainer_data(task, loaded.tokenizer, labelled)
    trainer = CompressionTrainer(loaded.model, arguments, **data)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    record |= {"methods": ["finetune"], "metrics": trainer.evaluate(), "data": task.fingerprint(unlabeled=False)}
    save_with_record(trainer, folder, **record)
    loaded.model, loaded.is_trained = trainer.unwrapped_model(), True


def finetune_teacher(teacher: Teacher, task: Task, encoded: dict[str, Any]) -> None:
    """Fine-tune a teacher as it is planned, on the tokens that it reads.

    Args:
        encoded: as the student reads the data.
    """
    assert teacher.plan is not None
    bare, others = LoadedModel(members(teacher.model)[0], teacher.tokenizer, False), list(teacher.others.values())
    if others:
        (bare.tokenizer,) = others
        with teacher.plan.main_process_first():
            encoded = task.encode(bare.tokenizer)
    finetune(bare, task, encoded, teacher.plan, identity=teacher.identity)
    if isinstance(teacher.model, OwnTokens):
        teacher.model.teacher = bare.model
    else:
        teacher.model = bare.model
    teacher.is_trained = True
