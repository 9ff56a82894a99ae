"""What the benchmarks on SST-2 share: its sentences, how a model is scored on them, and results that a stop leaves."""

import argparse
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, concatenate_datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from prunelle.tasks import DataArguments, TextClassification

# Hinton's soft targets with a tenth of cross-entropy (arXiv:1503.02531).
KD = {"soft_target_weight": 0.9, "hard_label_weight": 0.1, "hidden_cosine_weight": 0.0, "temperature": 2.0}
TRAINING = {  # what all runs have in common
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "group_by_length",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
TRAINING_SETTINGS = ("learning_rate", "no_dropout", "bf16", "spans", "replaced")


class Sentences:
    """SST-2 as a fine-tuned model reads it.

    Args:
        data_dir: With train.csv, validation.csv and test.csv.
        folder: The model's checkpoint.
        bf16: Whether it, and what is made of it, is to train in bfloat16. The kernel of PyTorch's own attention takes
            four times as long backwards on a CPU then as in float32, at these lengths; eager attention does not.
    """

    def __init__(self, data_dir: Path, folder: str, bf16: bool = False) -> None:
        files = {f"{split}_file": str(data_dir / f"{split}.csv") for split in ("train", "validation", "test")}
        self.task = TextClassification(DataArguments(**files), 0)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        attention = "eager" if bf16 else "sdpa"
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=attention)
        self.task.adopt(self.model.config, folder)
        self.encoded = self.task.encode(self.tokenizer)
        self.collate = self.task.collator(self.tokenizer, self.encoded)

    def predict(self, model: PreTrainedModel, split: str) -> torch.Tensor:
        """(rows,) the predicted classes."""
        return self.logits(model, split).argmax(-1)

    @torch.inference_mode()
    def logits(self, model: PreTrainedModel, split: str) -> torch.Tensor:
        """(rows, classes); texts of like length share a batch."""
        model.eval()
        rows = self.encoded[split]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
        found = torch.empty(len(rows), model.config.num_labels)
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            batch = self.collate([rows[row] for row in chosen])
            batch.pop("labels")
            found[chosen] = model(**batch.to(model.device)).logits.float().cpu()
        return found

    def accuracy(self, predicted: torch.Tensor, split: str) -> float:
        """In percent."""
        return percentage(predicted == torch.tensor(self.encoded[split]["labels"]))


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Those that both sweeps have: `TRAINING_SETTINGS`."""
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--no_dropout", action="store_true", help="train without it")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, but predict in float32")
    parser.add_argument("--spans", type=int, default=0, help="unlabeled spans of each training sentence, beside it")
    parser.add_argument(
        "--replaced", type=float, default=0.0, help="the share of words of spans that become any others"
    )


def training_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_training_flags` added, as the results' rows have it."""
    return {name: getattr(options, name) for name in TRAINING_SETTINGS}


def training_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """For `DistillationArguments`, with what all runs have in common."""
    return {
        "learning_rate": options.learning_rate,
        "disable_dropout": options.no_dropout,
        "bf16": options.bf16,
        "use_cpu": not torch.cuda.is_available(),  # else bf16 is refused there
        **TRAINING,
    }


def unlabeled(sentences: Sentences, labels: int | None, spans: int, replaced: float) -> dict[str, Any]:
    """The training split as it is to be: labelled rows, and unlabeled ones on which the teacher alone speaks.

    Args:
        labels: How many sentences, the first, keep their label; by default all.
        spans: How many of each sentence stand beside it.
        replaced: The share of words of spans that become any others.

    Spans of the sentences are the n-gram sampling of arXiv:1903.12136: text of the domain that costs nothing. Words
    that are put in at random have the teacher say what it makes of those that the sentences lack.
    """
    train, parts = sentences.encoded["train"], []
    if labels is not None:
        parts.append(train.select(range(labels, len(train))))
        train = train.select(range(labels))
    if spans:
        generator = random.Random(0)
        words = [word for word in sorted(sentences.tokenizer.get_vocab()) if word.isascii() and word.isalpha()]
        texts = [
            span(text, generator, words, replaced)
            for text in sentences.task.splits["train"]["text"]
            for _ in range(spans)
        ]
        length = sentences.task.arguments.max_seq_length
        encode = sentences.tokenizer(list(dict.fromkeys(texts)), truncation=True, max_length=length)
        parts.append(Dataset.from_dict({**encode, "labels": [0] * len(encode["input_ids"])}, features=train.features))
    if not parts:
        return {}
    rows = concatenate_datasets(parts)
    ignored = Dataset.from_dict({"labels": [-100] * len(rows)}, features=Features({"labels": train.features["labels"]}))
    rows = concatenate_datasets([rows.remove_columns("labels"), ignored], axis=1)
    return {"train": train, "unlabeled": rows}


def span(text: str, generator: random.Random, others: list[str], replaced: float) -> str:
    """Some consecutive words of a text, at least two where it has them, a share of which become any of the others."""
    words = text.split()
    first, last = sorted(generator.sample(range(len(words) + 1), 2)) if len(words) > 1 else (0, 1)
    chosen = words[first : max(last, first + 2)]
    if not replaced:  # and nothing more is drawn: spans stay those of the runs that are in the results
        return " ".join(chosen)
    return " ".join(generator.choice(others) if generator.random() < replaced else word for word in chosen)


def percentage(hits: torch.Tensor) -> float:
    return round(100 * hits.double().mean().item(), 3)


def is_done(run: dict[str, Any], file: Path) -> bool:
    """Whether the file has the results of a run of these settings."""
    return any(run.items() <= done.items() for done in results(file))


def append(run: dict[str, Any], file: Path) -> None:
    """Write and print a run's settings and results."""
    with file.open("a") as lines:
        print(json.dumps(run), file=lines)
    print(json.dumps(run), flush=True)


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def summary(
    runs: Iterable[dict[str, Any]], title: str, settings: Sequence[str], column: str
) -> dict[str, dict[str, list[float]]]:
    """[mean, standard deviation, number] of the test accuracy over the seeds, by title and settings, and by column."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        named = [f"{name} {run[name]}" for name in settings if run[name] is not None]
        found[" ".join([run[title], *named])][str(run[column])].append(run["test"])
    return {
        row: {
            cell: [
                round(statistics.mean(values), 2),
                round(statistics.stdev(values), 2) if len(values) > 1 else 0.0,
                len(values),
            ]
            for cell, values in cells.items()
        }
        for row, cells in found.items()
    }
