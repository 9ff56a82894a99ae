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
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, concatenate_datasets
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, set_seed

from prunelle.compression import student_from_layers
from prunelle.tasks import DataArguments, TextClassification
from prunelle.trainers import DistillationArguments, DistillationTrainer
from prunelle.trainers.ensemble import Ensemble
from prunelle.trainers.finetuning import trainer_data

# Hinton's soft targets with a tenth of cross-entropy (arXiv:1503.02531); the others add to them or replace them.
KD = {"soft_target_weight": 0.9, "hard_label_weight": 0.1, "hidden_cosine_weight": 0.0, "temperature": 2.0}
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
}
SETTINGS = ("steps", "learning_rate", "labels", "spans", "start", "teacher")
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
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--pretrained", help="take the students' layers from this model, not from the teacher")
    parser.add_argument("--labels", type=int, help="how many sentences, the first, keep their label; by default all")
    parser.add_argument("--spans", type=int, default=0, help="unlabeled spans of each training sentence, beside it")
    options = parser.parse_args()
    logging.disable(logging.INFO)

    files = {f"{split}_file": str(options.data_dir / f"{split}.csv") for split in ("train", "validation", "test")}
    task = TextClassification(DataArguments(**files), 0)
    tokenizer = AutoTokenizer.from_pretrained(options.teachers[0])
    teachers = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in options.teachers]
    if "ensemble" in options.methods and len(teachers) == 1:
        parser.error("an ensemble needs more than one of --teachers")
    teacher = teachers[0]
    task.adopt(teacher.config, options.teachers[0])
    encoded = task.encode(tokenizer)
    collate = task.collator(tokenizer, encoded)
    expected = predict(teacher, encoded["test"], collate)
    encoded |= unlabeled(task, tokenizer, encoded, options)
    start = teacher
    if options.pretrained is not None:
        start = AutoModelForSequenceClassification.from_pretrained(options.pretrained, config=teacher.config)

    settings = {name: getattr(options, name) for name in ("steps", "learning_rate", "labels", "spans")}
    settings["start"] = "teacher" if options.pretrained is None else "pretrained"
    settings["teacher"] = percentage(expected == torch.tensor(encoded["test"]["labels"]))
    ensemble = Ensemble(teachers, temperature=KD["temperature"])
    for seed in options.seeds:
        for student in options.students:
            for method in options.methods:
                run = {"student": student, "method": method, "seed": seed, **settings}
                if any(run.items() <= done.items() for done in results(options.results_file)):
                    continue
                started = time.perf_counter()
                model = make_student(start, STUDENTS[student], seed)
                rows = {
                    name: part for name, part in encoded.items() if (name, method) != ("unlabeled", "cross_entropy")
                }
                data = trainer_data(task, tokenizer, rows)
                train(model, ensemble if method == "ensemble" else teacher, method, data, options, seed)
                for split in ("validation", "test"):
                    predicted = predict(model, encoded[split], collate)
                    run[split] = percentage(predicted == torch.tensor(encoded[split]["labels"]))
                run["agreement"] = percentage(predicted == expected)
                run["seconds"] = round(time.perf_counter() - started)
                with options.results_file.open("a") as file:
                    print(json.dumps(run), file=file)
                print(json.dumps(run), flush=True)
    print(json.dumps(summary(results(options.results_file))))


def make_student(teacher: PreTrainedModel, layers: list[int] | None, seed: int) -> PreTrainedModel:
    """The teacher's layers; or, of half the hidden size, as many layers and heads from scratch."""
    set_seed(seed)
    if layers is not None:
        return student_from_layers(teacher, layers)
    config = AutoConfig.for_model(**teacher.config.to_dict())
    config.hidden_size, config.intermediate_size = config.hidden_size // 2, config.intermediate_size // 2
    return AutoModelForSequenceClassification.from_config(config)


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
                teacher_cache=f"{folder}/cache" if method == "cached" else None,
                **stage,
                hidden_projection=projection,
                learning_rate=options.learning_rate,
                max_steps=options.steps // len(stages),
                per_device_train_batch_size=32,
                per_device_eval_batch_size=64,
                train_sampling_strategy="group_by_length",
                warmup_steps=0.1,
                weight_decay=0.01,
                seed=seed * len(stages) + number,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            DistillationTrainer(student, teacher, arguments, teacher_folders=options.teachers[:1], **data).train()


def unlabeled(task: Any, tokenizer: Any, encoded: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The training split as it is to be: labelled rows, and unlabeled ones on which the teacher alone speaks.

    Spans of the sentences are the n-gram sampling of arXiv:1903.12136: text of the domain that costs nothing.
    """
    train, parts = encoded["train"], []
    if options.labels is not None:
        parts.append(train.select(range(options.labels, len(train))))
        train = train.select(range(options.labels))
    if options.spans:
        generator = random.Random(0)
        texts = [span(text, generator) for text in task.splits["train"]["text"] for _ in range(options.spans)]
        encode = tokenizer(list(dict.fromkeys(texts)), truncation=True, max_length=task.arguments.max_seq_length)
        parts.append(Dataset.from_dict({**encode, "labels": [0] * len(encode["input_ids"])}, features=train.features))
    if not parts:
        return {}
    rows = concatenate_datasets(parts)
    ignored = Dataset.from_dict({"labels": [-100] * len(rows)}, features=Features({"labels": train.features["labels"]}))
    rows = concatenate_datasets([rows.remove_columns("labels"), ignored], axis=1)
    return {"train": train, "unlabeled": rows}


def span(text: str, generator: random.Random) -> str:
    """Some consecutive words of a text, at least two where it has them."""
    words = text.split()
    first, last = sorted(generator.sample(range(len(words) + 1), 2)) if len(words) > 1 else (0, 1)
    return " ".join(words[first : max(last, first + 2)])


@torch.inference_mode()
def predict(model: PreTrainedModel, rows: Any, collate: Any) -> torch.Tensor:
    """(rows,) the predicted classes; texts of like length share a batch."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    predicted = torch.empty(len(rows), dtype=torch.long)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = collate([rows[row] for row in chosen])
        batch.pop("labels")
        predicted[chosen] = model(**batch.to(model.device)).logits.argmax(-1).cpu()
    return predicted


def percentage(hits: torch.Tensor) -> float:
    return round(100 * hits.double().mean().item(), 3)


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """[mean, standard deviation, number] of the test accuracy, by student and settings, and by method."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        settings = [f"{name} {run[name]}" for name in SETTINGS if run[name] is not None]
        found[" ".join([run["student"], *settings])][run["method"]].append(run["test"])
    return {
        student: {
            method: [
                round(statistics.mean(values), 2),
                round(statistics.stdev(values), 2) if len(values) > 1 else 0.0,
                len(values),
            ]
            for method, values in methods.items()
        }
        for student, methods in found.items()
    }


if __name__ == "__main__":
    main()
