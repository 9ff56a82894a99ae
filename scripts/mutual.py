"""Train two or more models that learn from the labels and from one another; keep all, and export the best.

accelerate launch scripts/mutual.py --config recipe.yaml [--any_flag value]
prunelle mutual --peer_name_or_path google-bert/bert-base-uncased distilbert/distilbert-base-uncased \
    --train_file reviews.csv --output_dir runs/peers
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from prunelle.cli import parse, run
from prunelle.launch import start
from prunelle.scripts._closing import close
from prunelle.tasks import TASKS, DataArguments
from prunelle.trainers import MutualArguments, MutualTrainer
from prunelle.trainers.finetuning import trainer_data
from prunelle.trainers.models import check_length
from prunelle.trainers.mutual import PeerArguments, load_peers

ARGUMENTS = (DataArguments, PeerArguments, MutualArguments)


def main(argv: Sequence[str]) -> None:
    data, models, arguments, recipe = parse(argv, *ARGUMENTS, description=__doc__)
    start(arguments, data)
    task = TASKS[data.task](data, arguments.seed)
    peers, tokenizer = load_peers(models, task)
    check_length(data, *peers)
    with arguments.main_process_first():
        encoded = task.encode(tokenizer)

    fitted = trainer_data(task, tokenizer, encoded)
    trainer = MutualTrainer(peers, arguments, **fitted)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_peers(Path(arguments.output_dir), tokenizer)
    close(trainer, task, encoded, fitted["data_collator"], methods=["mutual"], recipe=recipe)


if __name__ == "__main__":
    sys.exit(run(main))
