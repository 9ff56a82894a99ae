"""Teachers with tokenizers of their own: heard on their own tokens, example by example and word by word, or refused."""

import csv
import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tokenizers import normalizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

from prunelle.cli import main
from prunelle.export.inference import vocabulary_size
from prunelle.export.latency import full_batch
from prunelle.export.runner import TorchRunner
from prunelle.scripts import _closing
from prunelle.tasks import DataArguments, OtherTokensCollator, TokenClassification
from prunelle.tasks.several_tokenizers import prefix_of
from prunelle.tasks.tokenizer import train_tokenizer
from prunelle.trainers.own_tokens import OwnTokens

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
PREFIX = prefix_of(1)


@pytest.fixture
def closing(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What runs are closed with, in place of an export."""
    mock = Mock(return_value=Mock(to_text=str))
    monkeypatch.setattr(_closing, "export_and_report", mock)
    monkeypatch.setattr(_closing, "write_card", Mock())
    return mock


def texts_of(file: str) -> list[str]:
    with open(file, encoding="utf-8") as opened:
        return [row["sentence"] for row in csv.DictReader(opened)]


@pytest.fixture(scope="module")
def other(reviews: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier of the reviews whose tokenizer knows fewer and shorter words than the teacher's."""
    folder = str(tmp_path_factory.mktemp("other"))
    tokenizer = train_tokenizer(texts_of(reviews["--train_file"]), 330)
    set_seed(2)
    config = BertConfig(**SIZES, vocab_size=330, id2label={0: "bad", 1: "good"}, initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def words(reviews: dict[str, str], other: str, short_run: list[str], tmp_path: Path) -> list[str]:
    """Flags of a run whose student reads the other's tokens, without its teacher."""
    config = json.dumps({"model_type": "bert", **SIZES})
    student = ["--student_config", config, "--student_tokenizer_name_or_path", other]
    unlabeled = tmp_path / "more.txt"
    unlabeled.write_text("\n".join(texts_of(reviews["--test_file"])))
    data = [word for pair in reviews.items() for word in pair] + ["--unlabeled_file", str(unlabeled)]
    return [*data, *student, *short_run, "--max_seq_length", "64", "--hidden_cosine_weight", "0", "--max_steps", "4"]


def said(folder: str, texts: list[str]) -> Any:
    """The logits of a checkpoint on its own tokens, each text by itself: nothing can be padded or mixed up."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).double()
    read = [tokenizer(text, return_tensors="pt") for text in texts]
    assert max(each["input_ids"].shape[1] for each in read) <= 64
    with torch.no_grad():
        return torch.cat([model(**each).logits for each in read])


@pytest.mark.parametrize("count", [1, 2])
def test_texts_are_heard_on_the_teachers_own_tokens(
    count: int, words: list[str], teacher: str, other: str, reviews: dict[str, str], tmp_path: Path, closing: Mock
) -> None:
    """Prevents a teacher that is asked about ids that mean other words to it, or about another example's text; of two
    teachers the second reads the student's tokens."""
    words += ["--teacher_name_or_path", *[teacher, other][:count], "--output_dir", str(tmp_path / "run")]
    assert main(["distill", *words]) == 0
    texts = texts_of(reviews["--validation_file"])
    p = sum((said(each, texts) / 2).softmax(-1) for each in [teacher, other][:count]) / count
    q = (said(str(tmp_path / "run"), texts) / 2).softmax(-1)
    record = json.loads((tmp_path / "run" / "compression.json").read_text())
    (evaluation,) = [entry for entry in record["training"] if "eval_loss" in entry]
    expected = 4 * (p * (p / q).log()).sum(-1).mean().item()
    assert evaluation["eval_loss_soft_target"] == pytest.approx(expected, rel=1e-4)

    # As the closing table runs it: on the test texts, and on any tokens while it is timed.
    heard, batches = (closing.call_args.kwargs[name] for name in ("teacher", "batches"))
    runner = TorchRunner(heard.eval(), "teacher")
    logits = torch.cat([torch.from_numpy(runner(batch)) for batch in batches]).double()
    if count == 1:
        torch.testing.assert_close(logits, said(teacher, texts_of(reviews["--test_file"])), rtol=0, atol=1e-4)
    assert len(logits) == 48
    assert runner(full_batch(2, 8, vocabulary_size(heard))).shape == (2, 2)


def test_what_it_says_of_its_own_tokens_is_cached(
    words: list[str], teacher: str, tmp_path: Path, closing: Mock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a cached run that ends elsewhere, and answers to a text that the teacher now reads otherwise."""
    folder = tmp_path / "teacher"
    AutoModelForSequenceClassification.from_pretrained(teacher).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.save_pretrained(folder)
    words += ["--teacher_name_or_path", str(folder)]
    cache = ["--teacher_cache", str(tmp_path / "cache")]
    assert main(["distill", *words, "--output_dir", str(tmp_path / "1")]) == 0
    assert main(["distill", *words, *cache, "--output_dir", str(tmp_path / "2")]) == 0
    assert main(["distill", *words, *cache, "--output_dir", str(tmp_path / "3")]) == 0
    assert closing.call_args.kwargs["teacher"] is None
    one, *cached = (AutoModelForSequenceClassification.from_pretrained(tmp_path / number) for number in "123")
    for each in cached:
        for theirs, ours in zip(one.parameters(), each.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġfilm"] = vocabulary["Ġfilm"], vocabulary["Ġthe"]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    capsys.readouterr()
    assert main(["distill", *words, *cache, "--output_dir", str(tmp_path / "4")]) == 2
    assert "other in: training data, evaluation data" in capsys.readouterr().err


def test_a_bare_teacher_is_fine_tuned_on_its_own_tokens(
    words: list[str], teacher: str, reviews: dict[str, str], tmp_path: Path, closing: Mock
) -> None:
    """Prevents a teacher that learns from the student's ids, and is kept with the student's tokenizer."""
    config = json.dumps({"model_type": "bert", "vocab_size": 400, **SIZES})
    kept = str(tmp_path / "kept")
    words += ["--teacher_config", config, "--finetune_teacher", "--teacher_output_dir", kept]
    assert main(["distill", *words, "--output_dir", str(tmp_path / "run")]) == 0
    assert AutoTokenizer.from_pretrained(kept).get_vocab() == AutoTokenizer.from_pretrained(teacher).get_vocab()
    heard, batches = (closing.call_args.kwargs[name] for name in ("teacher", "batches"))
    logits = [torch.from_numpy(TorchRunner(heard.eval(), "teacher")(batch)) for batch in batches]
    expected = said(kept, texts_of(reviews["--test_file"])).float()
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tags_are_matched_word_by_word(tmp_path: Path, side: str) -> None:
    """Prevents a tag that is learned of another word: where words have other numbers of tokens, or none for one of the
    tokenizers, or lie beyond what it reads, and wherever the student's padding stands."""
    draw = random.Random(0)
    pieces = ["sea", "seaside", "un", "believable", "a", "\u200b", "quite", "paris", "x"]
    rows = []
    for _ in range(40):
        tokens = [draw.choice(pieces) + draw.choice(["", *pieces[:5]]) * (n % 2) for n in range(draw.randint(1, 9))]
        rows.append({"tokens": tokens, "tags": [draw.choice(["O", "B-X"]) for _ in tokens]})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    arguments = DataArguments(
        task="token-classification", train_file=str(file), validation_file=str(file), max_seq_length=11
    )
    task = TokenClassification(arguments, seed=0)
    # The student's drops what cannot be seen; the teacher's reads it, and has longer words.
    ours, theirs = train_tokenizer(task.texts(), 262), train_tokenizer(task.texts(), 300)
    theirs.backend_tokenizer.normalizer = normalizers.NFC()
    ours.padding_side = side
    set_seed(0)
    teacher = BertForTokenClassification(BertConfig(vocab_size=300, **SIZES, initializer_range=0.5)).double().eval()

    encoded = task.encode(ours, {PREFIX: theirs})
    batch = OtherTokensCollator(task.collator(ours, encoded), ours, {PREFIX: theirs})(list(encoded["train"]))
    own = {name: value for name, value in batch.items() if name.startswith(PREFIX)}
    with torch.no_grad():
        logits = OwnTokens(teacher, PREFIX)(**own).logits
    assert logits.shape[:2] == batch["labels"].shape

    def first(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> tuple[Any, dict[int | None, int]]:
        read = tokenizer(tokens, is_split_into_words=True, truncation=True, max_length=11, return_tensors="pt")
        numbers = read.word_ids()
        return read, {word: numbers.index(word) for word in numbers if word is not None}

    left_out = {"unseen": 0, "beyond": 0}
    for row, labels, said_here in zip(rows, batch["labels"], logits, strict=True):
        mine, (read, its) = first(ours, row["tokens"])[1], first(theirs, row["tokens"])
        with torch.no_grad():
            alone = teacher(**read).logits[0]
        asked = labels != -100
        shared = [word for word in range(len(row["tokens"])) if word in mine and word in its]
        left_out["unseen"] += sum(word in its for word in set(range(len(row["tokens"]))) - mine.keys())
        left_out["beyond"] += sum(word in mine for word in set(range(len(row["tokens"]))) - its.keys())
        assert labels[asked].tolist() == [task.class_index[row["tags"][word]] for word in shared]
        torch.testing.assert_close(said_here[asked], alone[[its[word] for word in shared]])
    assert all(left_out.values()), left_out


REFUSED: dict[str, tuple[list[str], str]] = {
    "what is inside": (
        ["--hidden_cosine_weight", "1", "--relation_weight", "1"],
        "reads other tokens than the student, and what it holds inside is of those: give --hidden_cosine_weight 0 "
        "--relation_weight 0",
    ),
    "generations": (["--generations", "2"], "reads other tokens than the student: distil once"),
    "layers": (["--student_layers", "0"], "--student_tokenizer_name_or_path: a student made of the teacher's layers"),
}


@pytest.mark.parametrize(("change", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_other_tokens_cannot_be_asked(
    words: list[str], teacher: str, change: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents hidden states of other words from being compared, place by place."""
    if change[0] == "--student_layers":
        del words[words.index("--student_config") : words.index("--student_config") + 2]
    words += ["--teacher_name_or_path", teacher, *change, "--output_dir", str(tmp_path / "none")]
    assert main(["distill", *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_tags_between_the_words_are_refused(tmp_path: Path, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents the teacher's view of the first token from being learned at every token that has no label."""
    rows = [{"tokens": ["to", "the", "sea"], "tags": ["O", "O", "B-X"]}] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = train_tokenizer(["to the sea by the sea"] * 4, 270)
    config = BertConfig(vocab_size=270, **SIZES, id2label={0: "B-X", 1: "O"})
    BertForTokenClassification(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    words = ["--task", "token-classification", "--train_file", str(tmp_path / "rows.jsonl"), "--max_seq_length", "16"]
    words += ["--teacher_name_or_path", str(tmp_path / "teacher"), "--student_tokenizer_name_or_path", other]
    words += ["--student_config", json.dumps({"model_type": "bert", **SIZES}), "--distilled_positions", "all"]
    words += ["--hidden_cosine_weight", "0", "--output_dir", str(tmp_path / "none")]
    assert main(["distill", *words]) == 2
    assert "meet at the first token of each word alone; give masked" in capsys.readouterr().err
