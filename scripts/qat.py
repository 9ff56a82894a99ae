"""Train a model to bear what quantization does to it, export it, and show that it does.

accelerate launch scripts/qat.py --config recipes/minilm/qat_sst2.yaml [--any_flag value]
prunelle qat --model_name_or_path runs/teacher --train_file reviews.csv --output_dir runs/int8
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import DataLoader

from prunelle.cli import parse, run
from prunelle.compression import bake_masks, student_from_layers
from prunelle.launch import start
from prunelle.scripts._closing import close
from prunelle.tasks import TASKS, DataArguments
from prunelle.trainers import (
    CompressionTrainer,
    DistillationTrainer,
    PruningArguments,
    QuantizationArguments,
    SelfDistillationArguments,
)
from prunelle.trainers.distillation import check_pair
from prunelle.trainers.finetuning import trainer_data
from prunelle.trainers.models import check_length, load_or_start
from prunelle.trainers.pruning import load_dense_teacher, prune_vocabularies, settle_distillation
from prunelle.trainers.quantization import QuantizedModelArguments, check_pruning_flags, leave_out_sensitive

ARGUMENTS = (DataArguments, QuantizedModelArguments, SelfDistillationArguments, QuantizationArguments, PruningArguments)


def main(argv: Sequence[str]) -> None:
    data, models, arguments, quantization, pruning, recipe = parse(argv, *ARGUMENTS, description=__doc__)
    settle_distillation(models, arguments, pruning, recipe)
    check_pruning_flags(models, pruning, recipe)
    start(arguments, data)
    task = TASKS[data.task](data, arguments.seed)
    quantized = load_or_start(models.model_name_or_path, models.model_config, models.tokenizer_name_or_path, task)
    teacher = load_dense_teacher(models, quantized, task)
    prune_vocabularies(pruning.prune_vocabulary, task, quantized, teacher)
    check_length(data, quantized.model)
    if (layers := models.layers()) is not None:
        quantized.model = student_from_layers(quantized.model, layers)
    with arguments.main_process_first():
        encoded = task.encode(quantized.tokenizer)
    inputs = trainer_data(task, quantized.tokenizer, encoded)
    examples = DataLoader(encoded["validation"], arguments.eval_batch_size, collate_fn=inputs["data_collator"])
    quantization = leave_out_sensitive(quantization, quantized.model, examples, Path(str(arguments.output_dir)))
    method = quantization.method()
    methods = [*(pruning.methods(arguments.seed, arguments.warmup_steps) if models.prune else []), method]
    if teacher is None:
        trainer = CompressionTrainer(quantized.model, arguments, methods, **inputs)
    else:
        check_pair(quantized.model, teacher.model, arguments)
        folders = [str(models.teacher_name_or_path)]
        trainer = DistillationTrainer(quantized.model, teacher.model, arguments, methods, folders, **inputs)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)

    plan, left = method.plan(), bake_masks(trainer.model)
    close(
        trainer,
        task,
        encoded,
        inputs["data_collator"],
        teacher,
        None if pruning.prune_vocabulary else models.teacher_name_or_path,
        plan,
        compact=pruning.compact if models.prune else None,
        save_sparse=pruning.save_sparse,
        methods=["distill"] * (teacher is not None) + ["prune"] * models.prune + ["quantize"],
        recipe=recipe,
        **left,
    )


if __name__ == "__main__":
    sys.exit(run(main))
