"""Vocabularies of student and teacher: cut where they are padded, refused where they are not the same."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from prunelle.cli import main
from prunelle.errors import InputError
from prunelle.scripts import _closing
from prunelle.tasks.tokenizer import train_causal_tokenizer, train_tokenizer
from prunelle.trainers.models import trim_vocabularies

TEXTS = [f"Line {number} of a text that a tokenizer can learn from.\n" for number in range(300)]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 280)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_padding_is_cut_and_nothing_else(name: str, tied: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    """Prevents a shape error in the first step, and a head whose bias stays longer than its weights or is lost."""
    large: Any = (
        BertForMaskedLM(BertConfig(vocab_size=320, **SIZES, tie_word_embeddings=tied))
        if name == "bert"
        else GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied))
    )
    small = BertForMaskedLM(BertConfig(vocab_size=288, **SIZES))
    for parameter in large.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        before = large.eval()(tokens).logits
        trim_vocabularies(tokenizer, small, large)
        after = large(tokens).logits
    assert large.config.vocab_size == after.shape[-1] == 288
    torch.testing.assert_close(after, before[..., :288])


def test_tokens_are_not_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    """Prevents a teacher from losing what it has to say about the last tokens."""
    models = [BertForMaskedLM(BertConfig(vocab_size=size, **SIZES)) for size in (len(tokenizer) - 1, 320)]
    with pytest.raises(InputError, match=r"one of 279, and the tokenizer 280 tokens: the smaller cannot read"):
        trim_vocabularies(tokenizer, *models)


def test_a_padded_teacher_is_heard_and_one_of_other_tokens_refused(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    short_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prevents training on nonsense where ids stand for other tokens, even if there are as many."""
    monkeypatch.setattr(_closing, "export_and_report", lambda *_, **__: Mock(to_text=str))
    monkeypatch.setattr(_closing, "write_card", Mock())
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    for folder, size, own_tokenizer in (
        ("teacher", 320, tokenizer),
        ("student", 288, tokenizer),
        ("stranger", 320, train_causal_tokenizer(TEXTS, 280)),
    ):
        BertForMaskedLM(BertConfig(vocab_size=size, **SIZES)).save_pretrained(tmp_path / folder)
        own_tokenizer.save_pretrained(tmp_path / folder)
    words = ["--task", "masked-lm", "--train_file", str(tmp_path / "text.txt"), *short_run, "--max_steps", "1"]
    words += ["--teacher_name_or_path", str(tmp_path / "teacher")]

    run = str(tmp_path / "run")
    assert main(["distill", *words, "--student_name_or_path", str(tmp_path / "student"), "--output_dir", run]) == 0
    assert AutoModelForMaskedLM.from_pretrained(run).config.vocab_size == 288
    run = str(tmp_path / "run-2")
    config = json.dumps({"model_type": "bert", "vocab_size": 384, **SIZES})
    assert main(["distill", *words, "--student_config", config, "--output_dir", run]) == 0
    assert AutoModelForMaskedLM.from_pretrained(run).config.vocab_size == 320

    capsys.readouterr()
    stranger = ["--student_name_or_path", str(tmp_path / "stranger"), "--output_dir", str(tmp_path / "run-3")]
    assert main(["distill", *words, *stranger]) == 2
    assert "both must read the same token ids" in capsys.readouterr().err
