"""What pruning single weights costs on SST-2: scores, densities, starts and lengths of run, side by side.

    python benchmarks/sst2_densities.py --data_dir data/sst2 --teacher runs/teacher --pretrained MODEL \
        --results_file benchmarks/results/sst2_densities.jsonl

Every run prunes the linear weights within the layers while it learns from the fine-tuned teacher, from its weights or
from pretrained ones. One JSON line a run is appended to the results file as the run ends, and runs that are in it are
not repeated, so that a stop loses nothing and several processes can each do a part. The last line is JSON: test
accuracy in percent, mean and standard deviation over the seeds, by score and settings and by density.
"""

import argparse
import itertools
import json
import logging
import math
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

from sst2 import (
    KD,
    TRAINING,
    TRAINING_SETTINGS,
    Sentences,
    add_training_flags,
    append,
    is_done,
    percentage,
    results,
    summary,
    training_arguments,
    training_settings,
    unlabeled,
)
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

from prunelle.compression import bake
from prunelle.compression.pruning import density_by_weight
from prunelle.compression.pruning.unit_masks import LEARNED
from prunelle.trainers import DistillationArguments, DistillationTrainer, PruningArguments
from prunelle.trainers.finetuning import trainer_data

SETTINGS = ("start", "epochs", *TRAINING_SETTINGS, "score_learning_rate", "score_init", "cooldown", "teacher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="with train.csv, validation.csv and test.csv")
    parser.add_argument("--teacher", required=True, help="a fine-tuned checkpoint")
    parser.add_argument("--pretrained", help="start from this model, not from the teacher")
    parser.add_argument("--results_file", type=Path, required=True)
    parser.add_argument("--scores", nargs="+", default=["magnitude", "movement", "soft_movement"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.5, 0.3, 0.15, 0.1, 0.05, 0.03])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=5, help="of the sentences; spans do not add steps")
    add_training_flags(parser)
    parser.add_argument("--score_learning_rate", type=float, default=1e-2)
    parser.add_argument("--score_init", default="magnitude")
    parser.add_argument("--cooldown", type=float, default=0.3)
    parser.add_argument("--teacher_cache", help="a folder for the teacher's predictions, which all runs share")
    options = parser.parse_args()
    logging.disable(logging.INFO)

    sentences = Sentences(options.data_dir, options.teacher, options.bf16)
    start = sentences.model
    if options.pretrained is not None:
        set_seed(0)
        config = sentences.model.config
        start = AutoModelForSequenceClassification.from_pretrained(options.pretrained, config=config)
    encoded = sentences.encoded | unlabeled(sentences, None, options.spans, options.replaced)
    expected = sentences.predict(sentences.model, "test")
    settings = {"epochs": options.epochs, "cooldown": options.cooldown, **training_settings(options)}
    settings["start"] = "fine-tuned" if options.pretrained is None else "pretrained"
    settings["teacher"] = sentences.accuracy(expected, "test")
    for seed, density, score in itertools.product(options.seeds, options.densities, options.scores):
        is_learned = score in LEARNED
        run = {
            "score": score,
            "density": density,
            "seed": seed,
            **settings,
            "score_learning_rate": options.score_learning_rate if is_learned else None,
            "score_init": options.score_init if is_learned else None,
        }
        if is_done(run, options.results_file):
            continue
        started = time.perf_counter()
        model, achieved = prune(start, sentences, encoded, score, density, seed, options)
        for split in ("validation", "test"):
            predicted = sentences.predict(model, split)
            run[split] = sentences.accuracy(predicted, split)
        run["agreement"] = percentage(predicted == expected)
        run["achieved"] = achieved
        run["seconds"] = round(time.perf_counter() - started)
        append(run, options.results_file)
    print(json.dumps(summary(results(options.results_file), "score", SETTINGS, "density")))


def prune(
    start: PreTrainedModel,
    sentences: Sentences,
    encoded: dict[str, Any],
    score: str,
    density: float,
    seed: int,
    options: argparse.Namespace,
) -> tuple[PreTrainedModel, float]:
    """A model that was pruned from `start`, and the density of its pruned weights together."""
    set_seed(seed)
    model = deepcopy(start).requires_grad_()  # a trainer whose teacher it was has frozen it
    learning = {"score_init": options.score_init, "score_learning_rate": options.score_learning_rate}
    pruning = PruningArguments(
        density=[density],
        score=score,  # type: ignore[arg-type]
        pruning_cooldown=options.cooldown,
        **(learning if score in LEARNED else {}),
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationArguments(
            output_dir=folder,
            teacher_cache=options.teacher_cache,
            max_steps=options.epochs * math.ceil(len(encoded["train"]) / TRAINING["per_device_train_batch_size"]),
            seed=seed,
            **KD,
            **training_arguments(options),
        )
        inputs = trainer_data(sentences.task, sentences.tokenizer, encoded)
        methods = pruning.methods(seed)
        DistillationTrainer(model, sentences.model, arguments, methods, [options.teacher], **inputs).train()
    names = bake(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    densities = density_by_weight(model, names)
    total = sum(sizes[name] for name in densities)
    return model, round(sum(sizes[name] * value for name, value in densities.items()) / total, 5)


if __name__ == "__main__":
    main()
