"""Train a model, such as a teacher, on labels alone.

accelerate launch scripts/finetune.py --config recipes/minilm/teacher_sst2.yaml [--any_flag value]
prunelle finetune --model_name_or_path bert-base-uncased --train_file reviews.csv --output_dir runs/teacher
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from prunelle.cli import parse, run
from prunelle.export import write_card
from prunelle.export.hub import repository_of, upload
from prunelle.launch import start
from prunelle.tasks import TASKS, DataArguments
from prunelle.trainers import FinetuningArguments
from prunelle.trainers.finetuning import finetune
from prunelle.trainers.models import ModelArguments, check_length, load_or_start

ARGUMENTS = (DataArguments, ModelArguments, FinetuningArguments)


def main(argv: Sequence[str]) -> None:
    data, models, arguments, recipe = parse(argv, *ARGUMENTS, description=__doc__)
    start(arguments, data)
    task = TASKS[data.task](data, arguments.seed)
    model = load_or_start(models.model_name_or_path, models.model_config, models.tokenizer_name_or_path, task)
    check_length(data, model.model)
    with arguments.main_process_first():
        encoded = task.encode(model.tokenizer)
    finetune(model, task, encoded, arguments, recipe=recipe)
    if arguments.process_index == 0:
        folder, repository = Path(arguments.output_dir), repository_of(arguments)
        write_card(folder, model_id=repository)
        upload(folder, repository, arguments)


if __name__ == "__main__":
    sys.exit(run(main))
