"""Tokenizers that come with checkpoints: which can be used, and what they pad with."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from prunelle.cli import main
from prunelle.export import load_checkpoint
from prunelle.tasks import TASKS, DataArguments
from prunelle.tasks.pretrained_tokenizer import load_tokenizer
from prunelle.tasks.tokenizer import train_causal_tokenizer
from prunelle.trainers.models import load_model

TEXTS = ["a bird in the hand is worth two in the bush", "a bird", "two in the bush"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Without a padding token, as GPT-2's."""
    tokenizer = train_causal_tokenizer(TEXTS, 280)
    tokenizer.pad_token = None
    return tokenizer


@pytest.fixture
def gpt2(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    set_seed(0)
    config = GPT2Config(vocab_size=280, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    folder = str(tmp_path / "gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_padded_text_is_classified_as_it_is_alone(gpt2: str, reviews: dict[str, str], tmp_path: Path) -> None:
    """Prevents a decoder that takes padding for a text's last token, trained or loaded from what it was saved as."""
    names = {flag.removeprefix("--"): file for flag, file in reviews.items()}
    task = TASKS["text-classification"](DataArguments(**names), 0)
    loaded = load_model(gpt2, task)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_checkpoint(str(tmp_path / "saved"))
    encoded = [{**loaded.tokenizer(text), "labels": 0} for text in TEXTS]
    for model, tokenizer in ((loaded.model.eval(), loaded.tokenizer), (again.model, again.tokenizer)):
        collate = task.collator(tokenizer, {})
        with torch.no_grad():
            together = model(**collate(encoded)).logits
            alone = torch.cat([model(**collate([example])).logits for example in encoded])
        torch.testing.assert_close(together, alone)


def test_a_bare_decoder_is_fine_tuned_and_distilled(
    gpt2: str, reviews: dict[str, str], short_run: list[str], tmp_path: Path
) -> None:
    """Prevents a traceback in the first step from a teacher that is as it comes from the hub."""
    words = [*(word for pair in reviews.items() for word in pair), *short_run, "--max_steps", "2"]
    words += ["--teacher_name_or_path", gpt2, "--finetune_teacher", "--student_layers", "0"]
    assert main(["distill", *words, "--output_dir", str(tmp_path / "run")]) == 0


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(
    gpt2: str,
    tokenizer: PreTrainedTokenizerFast,
    reviews: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prevents a traceback where there is no end of a text either."""
    tokenizer.eos_token = None
    tokenizer.save_pretrained(gpt2)
    words = [word for pair in reviews.items() for word in pair] + [
        "--model_name_or_path",
        gpt2,
        "--max_seq_length",
        "24",
    ]
    assert main(["finetune", *words, "--output_dir", str(tmp_path / "run")]) == 2
    assert "has no token to pad a batch with" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_a_padding_token_of_its_own_stays(gpt2: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Prevents a tokenizer that has one from padding with another token than the model was trained with."""
    tokenizer.pad_token = "a"
    tokenizer.save_pretrained(gpt2)
    assert load_tokenizer(gpt2).pad_token == "a"


@pytest.mark.parametrize("command", ["distill", "export", "compare"])
def test_a_folder_without_a_tokenizer_is_refused(
    command: str, teacher: str, reviews: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents every word from being read as unknown, by the tokenizer that is made up where there is none."""
    bare = str(tmp_path / "bare")
    AutoModelForSequenceClassification.from_pretrained(teacher).save_pretrained(bare)
    words = {
        "distill": ["--teacher_name_or_path", bare, "--student_layers", "0"],
        "export": ["--model_name_or_path", bare],
        "compare": ["--reference", bare, "--candidates", teacher, "--latency_seconds", "0"],
    }[command]
    words += [*(word for pair in reviews.items() for word in pair), "--max_seq_length", "24"]
    assert main([command, *words, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: .*no tokenizer", error)
    assert ("--tokenizer_name_or_path" in error) == (command == "distill")


def test_a_tokenizer_that_is_named_takes_the_place_of_one_that_is_missing(
    teacher: str, reviews: dict[str, str], tmp_path: Path
) -> None:
    """Prevents the remedy that the message names from being refused alike."""
    bare = str(tmp_path / "bare")
    AutoModelForSequenceClassification.from_pretrained(teacher).save_pretrained(bare)
    names = {flag.removeprefix("--"): file for flag, file in reviews.items()}
    loaded = load_model(bare, TASKS["text-classification"](DataArguments(**names), 0), teacher)
    assert loaded.tokenizer.get_vocab() == load_tokenizer(teacher).get_vocab()
