"""What tests share: no network, one thread, and a small labelled data set with a tiny teacher trained on it."""

import os

# Before torch and the hub's client are imported, here and in the processes that tests start.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}

import csv
import json
import random
from pathlib import Path

import pytest

GOOD = ["lovely", "warm", "bright", "funny", "clever", "moving", "fresh", "sweet"]
BAD = ["dull", "cold", "bleak", "stale", "clumsy", "tedious", "bitter", "flat"]
FILLER = ["the", "film", "was", "a", "story", "of", "two", "people", "and", "their", "dog", "by", "the", "sea"]

TEACHER_CONFIG = {
    "model_type": "bert",
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
}


def write_reviews(path: Path, count: int, seed: int) -> Path:
    """Sentences of filler with a few words that give the label away."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        for _ in range(count):
            label = draw.choice(["good", "bad"])
            words = draw.choices(FILLER, k=draw.randint(4, 12)) + draw.choices(GOOD if label == "good" else BAD, k=2)
            draw.shuffle(words)
            writer.writerow([" ".join(words), label])
    return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Flags that name a training, a validation and a test file."""
    folder = tmp_path_factory.mktemp("reviews")
    return {
        f"--{split}_file": str(write_reviews(folder / f"{split}.csv", count, seed))
        for seed, (split, count) in enumerate({"train": 256, "validation": 64, "test": 48}.items())
    }


@pytest.fixture(scope="session")
def teacher(reviews: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny BERT, trained on the reviews by the command line."""
    from prunelle.cli import main

    folder = str(tmp_path_factory.mktemp("teacher") / "checkpoint")
    words = ["--model_config", json.dumps(TEACHER_CONFIG), "--output_dir", folder, *SHORT_RUN]
    long_enough = ["--learning_rate", "3e-3", "--per_device_train_batch_size", "8", "--num_train_epochs", "12"]
    assert main(["finetune", *flags(reviews), *words, *long_enough]) == 0
    return folder


SHORT_RUN = [
    *("--max_seq_length", "24"),
    *("--per_device_train_batch_size", "32"),
    *("--per_device_eval_batch_size", "32"),
    *("--logging_steps", "2"),
    *("--save_strategy", "no"),
    *("--disable_tqdm", "true"),
]


def flags(named: dict[str, str]) -> list[str]:
    return [word for pair in named.items() for word in pair]


@pytest.fixture
def short_run() -> list[str]:
    return list(SHORT_RUN)
