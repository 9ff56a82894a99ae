"""Distil a teacher into a student, export it, and show that it still predicts the same.

    accelerate launch scripts/distill.py --config recipes/quickstart.yaml [--any_flag value]
    prunelle distill --teacher_name_or_path runs/teacher --student_layers 0,2,5 \
        --train_file reviews.csv --output_dir runs/student
"""

import sys
from collections.abc import Sequence

from prunelle.cli import parse, run
from prunelle.launch import start
from prunelle.scripts._closing import close
from prunelle.tasks import TASKS, DistillationDataArguments
from prunelle.trainers import DistillationArguments, DistillationTrainer
from prunelle.trainers.distillation import check_pair, check_unlabeled
from prunelle.trainers.finetuning import finetune_teacher, load_teacher, trainer_data
from prunelle.trainers.generations import check_generations, earlier_generations
from prunelle.trainers.models import TeacherStudentArguments, build_student, check_length, tokenizer_for

ARGUMENTS = (DistillationDataArguments, TeacherStudentArguments, DistillationArguments)


def main(argv: Sequence[str]) -> None:
    data, models, arguments, recipe = parse(argv, *ARGUMENTS, description=__doc__)
    start(arguments, data)
    check_unlabeled(data.unlabeled_file, arguments)
    check_generations(models, arguments)
    task = TASKS[data.task](data, arguments.seed)
    teacher = load_teacher(models, task, arguments)

    # What does not fit is refused here, before the teacher is trained; then the student takes trained layers.
    student = build_student(models, teacher.model, task, teacher.tokenizer)
    check_pair(student, teacher.model, arguments)
    check_length(data, teacher.model, student)
    with arguments.main_process_first():
        encoded = teacher.encode(task)
    if teacher.plan is not None:
        finetune_teacher(teacher, task, encoded)
        student = build_student(models, teacher.model, task, teacher.tokenizer)
    if models.generations > 1:
        teacher = earlier_generations(teacher, models, task, encoded, arguments)
        student = build_student(models, teacher.model, task, teacher.tokenizer)

    tokenizer = tokenizer_for(student, teacher.tokenizer)
    fitted = trainer_data(task, tokenizer, encoded, teacher.others)
    trainer = DistillationTrainer(student, teacher.model, arguments, teacher_folders=teacher.folders, **fitted)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    compared = teacher if teacher.is_loaded else None
    collator = fitted["data_collator"]
    close(trainer, task, encoded, collator, compared, teacher.folder, methods=["distill"], recipe=recipe)


if __name__ == "__main__":
    sys.exit(run(main))
