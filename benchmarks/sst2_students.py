"""Which way of distilling is worth what on SST-2: methods and sizes of student, at equal steps.

    python benchmarks/sst2_students.py --data_dir data/sst2 --teachers runs/teacher-0 runs/teacher-1 runs/teacher-2 \
        --results_file benchmarks/results/sst2_students.jsonl

Every student starts from the first teacher's layers (of half the hidden size: from scratch) and trains for the same
number of steps on the same batches. One JSON line a run is appended to the results file as the run ends, and runs
that are in it are not repeated, so that a stop loses nothing and several processes can each do a part. The last line
is JSON: test accuracy in percent, mean and standard deviation over the seeds, by student, settings and method.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from sst2 import (
    KD,
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
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, set_seed

from prunelle.compression import student_from_layers
from prunelle.trainers import DistillationArguments, DistillationTrainer
from prunelle.trainers.ensemble import Ensemble
from prunelle.trainers.finetuning import trainer_data

NOTHING = {"soft_target_weight": 0.0, "hard_label_weight": 0.0, "hidden_cosine_weight": 0.0}
FEATURES = {"hidden_mse_weight": 1.0, "embedding_weight": 1.0, "attention_weight": 1.0}
METHODS: dict[str, list[dict[str, Any]]] = {  # stages, of equal length
    "cross_entropy": [{**NOTHING, "hard_label_weight": 1.0}],
    "kd": [KD],
    "triple": [{**KD, "hidden_cosine_weight": 1.0}],  # arXiv:1910.01108
    "patient": [{**KD, "patient_weight": 10.0}],  # arXiv:1908.09355
    "tinybert": [{**NOTHING, **FEATURES}, KD],  # arXiv:1909.10351
    "minilm": [{**KD, "relation_weight": 1.0}],  # arXiv:2012.15828
    "ensemble": [KD],  # all teachers, the mean of their probabilities
    "cached": [KD],  # by --teacher_cache
    "cached_ensemble": [KD],  # the same of all teachers
}
OF_ALL = ("ensemble", "cached_ensemble")  # the teachers, not the first alone
SETTINGS = ("steps", "batch", *TRAINING_SETTINGS, "frozen_embeddings", "labels", "start", "teacher")
STUDENTS = {"3_layers": [0, 2, 5], "2_layers": [0, 5], "1_layer": [0], "half_hidden": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="with train.csv, validation.csv and test.csv")
    parser.add_argument("--teachers", nargs="+", required=True, help="fine-tuned checkpoints")
    parser.add_argument("--results_file", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=434, help="217 are an epoch")
    add_training_flags(parser)
    parser.add_argument("--batch", type=int, default=32, help="sentences a step")
    parser.add_argument("--frozen_embeddings", action="store_true", help="leave the students' as they begin")
    parser.add_argument("--pretrained", help="take the students' layers from this model, not from the teacher")
    parser.add_argument("--labels", type=int, help="how many sentences, the first, keep their label; by default all")
    parser.add_argument("--teacher_cache", help="a folder for what is cached; by default each run makes its own")
    options = parser.parse_args()
    logging.disable(logging.INFO)

    sentences = Sentences(options.data_dir, options.teachers[0], options.bf16)
    teacher = sentences.model
    others = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in options.teachers[1:]]
    if set(OF_ALL) & set(options.methods) and not others:
        parser.error("an ensemble needs more than one of --teachers")
    expected = sentences.predict(teacher, "test")
    encoded = sentences.encoded | unlabeled(sentences, options.labels, options.spans, options.replaced)
    start = teacher
    if options.pretrained is not None:
        start = AutoModelForSequenceClassification.from_pretrained(options.pretrained, config=teacher.config)

    settings = {name: getattr(options, name) for name in ("steps", "batch", "labels", "frozen_embeddings")}
    settings |= training_settings(options)
    settings["start"] = "teacher" if options.pretrained is None else "pretrained"
    settings["teacher"] = sentences.accuracy(expected, "test")
    ensemble = Ensemble([teacher, *others], temperature=KD["temperature"])
    for seed in options.seeds:
        for student in options.students:
            for method in options.methods:
                run = {"student": student, "method": method, "seed": seed, **settings}
                if is_done(run, options.results_file):
                    continue
                started = time.perf_counter()
                model = make_student(start, STUDENTS[student], seed)
                rows = {
                    name: part for name, part in encoded.items() if (name, method) != ("unlabeled", "cross_entropy")
                }
                data = trainer_data(sentences.task, sentences.tokenizer, rows)
                train(model, ensemble if method in OF_ALL else teacher, method, data, options, seed)
                for split in ("validation", "test"):
                    predicted = sentences.predict(model, split)
                    run[split] = sentences.accuracy(predicted, split)
                run["agreement"] = percentage(predicted == expected)
                run["seconds"] = round(time.perf_counter() - started)
                append(run, options.results_file)
    print(json.dumps(summary(results(options.results_file), "student", SETTINGS, "method")))


def make_student(teacher: PreTrainedModel, layers: list[int] | None, seed: int) -> PreTrainedModel:
    """The teacher's layers; or, of half the hidden size, as many layers and heads from scratch."""
    set_seed(seed)
    if layers is not None:
        return student_from_layers(teacher, layers)
    config = AutoConfig.for_model(**teacher.config.to_dict())
    config.hidden_size, config.intermediate_size = config.hidden_size // 2, config.intermediate_size // 2
    return AutoModelForSequenceClassification.from_config(
        config, attn_implementation=teacher.config._attn_implementation
    )


def train(
    student: PreTrainedModel,
    teacher: nn.Module,
    method: str,
    data: dict[str, Any],
    options: argparse.Namespace,
    seed: int,
) -> None:
    """Train in stages of equal length, in place."""
    stages = METHODS[method]
    projection = "none" if student.config.hidden_size == teacher.config.hidden_size else "random"
    with tempfile.TemporaryDirectory() as folder:
        for number, stage in enumerate(stages):
            arguments = DistillationArguments(
                output_dir=folder,
                teacher_cache=f"{options.teacher_cache or folder}/{method}" if "cached" in method else None,
                **stage,
                hidden_projection=projection,
                max_steps=options.steps // len(stages),
                seed=seed * len(stages) + number,
                **(training_arguments(options) | {"per_device_train_batch_size": options.batch}),
                frozen_modules=["*embeddings"] if options.frozen_embeddings else [],
            )
            folders = options.teachers if method in OF_ALL else options.teachers[:1]
            DistillationTrainer(student, teacher, arguments, teacher_folders=folders, **data).train()


if __name__ == "__main__":
    main()
