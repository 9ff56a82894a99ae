"""Prune a model while it learns from labels or from a teacher, export it, and show what that changed.

accelerate launch scripts/prune.py --config recipes/minilm/prune_sst2.yaml [--any_flag value]
prunelle prune --model_name_or_path runs/teacher --teacher_name_or_path runs/teacher --density 0.15 \
    --train_file reviews.csv --output_dir runs/pruned
"""

import sys
from collections.abc import Sequence

from prunelle.cli import parse, run
from prunelle.compression import bake_masks
from prunelle.compression.anatomy import dissect
from prunelle.launch import start
from prunelle.scripts._closing import close
from prunelle.tasks import TASKS, DataArguments
from prunelle.trainers import DistillationArguments, DistillationTrainer, PruningArguments, PruningTrainer
from prunelle.trainers.distillation import check_pair
from prunelle.trainers.finetuning import trainer_data
from prunelle.trainers.models import check_length, load_or_start
from prunelle.trainers.pruning import (
    PrunedModelArguments,
    load_dense_teacher,
    prune_vocabularies,
    settle_distillation,
)

ARGUMENTS = (DataArguments, PrunedModelArguments, DistillationArguments, PruningArguments)


def main(argv: Sequence[str]) -> None:
    data, models, arguments, pruning, recipe = parse(argv, *ARGUMENTS, description=__doc__)
    settle_distillation(models, arguments, pruning, recipe)
    start(arguments, data)
    task = TASKS[data.task](data, arguments.seed)
    pruned = load_or_start(models.model_name_or_path, models.model_config, models.tokenizer_name_or_path, task)
    teacher = load_dense_teacher(models, pruned, task)
    prune_vocabularies(pruning.prune_vocabulary, task, pruned, teacher)
    check_length(data, pruned.model)
    if pruning.shrink:
        dissect(pruned.model)  # raises where shrinking would, after all the training
    with arguments.main_process_first():
        encoded = task.encode(pruned.tokenizer)

    inputs = trainer_data(task, pruned.tokenizer, encoded)
    if teacher is None:
        trainer = PruningTrainer(pruned.model, arguments, pruning, **inputs)
    else:
        check_pair(pruned.model, teacher.model, arguments)
        methods = pruning.methods(arguments.seed, arguments.warmup_steps)
        folders = [str(models.teacher_name_or_path)]
        trainer = DistillationTrainer(pruned.model, teacher.model, arguments, methods, folders, **inputs)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)

    left = bake_masks(trainer.model)
    close(
        trainer,
        task,
        encoded,
        inputs["data_collator"],
        teacher,
        None if pruning.prune_vocabulary else models.teacher_name_or_path,
        compact=pruning.compact,
        save_sparse=pruning.save_sparse,
        methods=["prune"] if teacher is None else ["distill", "prune"],
        recipe=recipe,
        **left,
    )


if __name__ == "__main__":
    sys.exit(run(main))
