"""Self-distillation: each generation of a student is taught by the one before it."""

import copy
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import set_seed

from prunelle.compression.record import fingerprint
from prunelle.errors import InputError
from prunelle.tasks import Task
from prunelle.trainers.arguments import DistillationArguments, FinetuningArguments
from prunelle.trainers.distillation import DistillationTrainer
from prunelle.trainers.finetuning import SETTINGS_THAT_TRAIN, Teacher, reusable_teacher, save_with_record, trainer_data
from prunelle.trainers.models import TeacherStudentArguments, build_student, tokenizer_for
from prunelle.trainers.teacher_cache import checkpoint_fingerprint

logger = logging.getLogger(__name__)

LOSS_SETTINGS = sorted({f.name for f in fields(DistillationArguments)} - {f.name for f in fields(FinetuningArguments)})


def check_generations(models: TeacherStudentArguments, arguments: DistillationArguments) -> None:
    """See that every generation can be made like the first, and asks its own teacher.

    Raises:
        InputError: There are several, and the student is made of its teacher's layers, or answers are cached.
    """
    if models.generations == 1:
        return
    if models.student_is_of_the_teacher:
        raise InputError(
            f"--generations {models.generations}: the layers of the teacher would be taken of each generation anew; "
            "give the student by --student_config, which may be the teacher's folder, or --student_name_or_path"
        )
    if arguments.teacher_cache is not None:
        raise InputError(
            f"--generations {models.generations} has as many teachers, and --teacher_cache keeps what one says"
        )


def earlier_generations(
    teacher: Teacher,
    models: TeacherStudentArguments,
    task: Task,
    encoded: dict[str, Any],
    arguments: DistillationArguments,
) -> Teacher:
    """The teacher of the last generation. Generation n is kept in OUTPUT_DIR-generation-n, and used again.

    Each starts anew, from a seed of its own.

    Raises:
        InputError: The folder of a generation holds something else.

    Reference:
        Furlanello et al., Born-Again Neural Networks, arXiv:1805.04770.
    """
    for number in range(1, models.generations):
        teacher = _generation(number, teacher, models, task, encoded, arguments)
    set_seed(arguments.seed)  # as if no generation had been trained in this run
    return teacher


def _generation(
    number: int,
    teacher: Teacher,
    models: TeacherStudentArguments,
    task: Task,
    encoded: dict[str, Any],
    arguments: DistillationArguments,
) -> Teacher:
    folder = Path(f"{str(arguments.output_dir).rstrip('/')}-generation-{number}")
    plan = copy.copy(arguments)
    plan.output_dir, plan.seed, plan.resume_from_checkpoint = str(folder), arguments.seed + number, None
    plan.push_to_hub = False
    identity = _identity(teacher, models, task, plan)
    if (found := reusable_teacher(folder, identity, task, flag="output_dir")) is not None:
        return Teacher(**vars(found), folder=str(folder))

    logger.info("generation %d of %d", number, models.generations)
    set_seed(plan.seed)
    student = build_student(models, teacher.model, task, teacher.tokenizer)
    data = trainer_data(task, tokenizer_for(student, teacher.tokenizer), encoded)
    trainer = DistillationTrainer(student, teacher.model, plan, **data)
    trainer.train()
    metrics, history = trainer.evaluate(), trainer.state.log_history
    save_with_record(trainer, folder, methods=["distill"], identity=identity, metrics=metrics, training=history)
    return Teacher(trainer.unwrapped_model(), teacher.tokenizer, True, folder=str(folder))


def _identity(teacher: Teacher, models: TeacherStudentArguments, task: Task, plan: DistillationArguments) -> str:
    """A fingerprint of everything that a generation depends on."""
    return fingerprint(
        [checkpoint_fingerprint(folder) for folder in teacher.folders],
        sorted(teacher.tokenizer.get_vocab().items()),
        {name: value for name, value in vars(models).items() if name.startswith("student_")},
        (models.teacher_weights, models.teacher_mean),
        task.fingerprint(),
        plan.train_batch_size * plan.gradient_accumulation_steps * plan.world_size,
        {name: getattr(plan, name) for name in (*SETTINGS_THAT_TRAIN, *LOSS_SETTINGS)},
    )
