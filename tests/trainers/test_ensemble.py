"""Several teachers: the mean that every loss hears, whatever the order of their classes."""

import copy
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from prunelle.cli import main
from prunelle.errors import InputError
from prunelle.export.inference import LogitsOnly
from prunelle.scripts import _closing
from prunelle.trainers.ensemble import Ensemble

TOKENS = torch.arange(12).reshape(2, 6)
NAMES = {0: "one", 1: "two", 2: "three"}


def teacher(seed: int) -> PreTrainedModel:
    set_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        id2label=NAMES,
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config).double().eval()


def permuted(model: PreTrainedModel, order: Sequence[int]) -> PreTrainedModel:
    """The same classifier with its classes in another order."""
    other: Any = copy.deepcopy(model)
    other.config.id2label = {place: model.config.id2label[old] for place, old in enumerate(order)}
    other.config.label2id = {name: place for place, name in other.config.id2label.items()}
    with torch.no_grad():
        for parameter in other.classifier.parameters():
            parameter.copy_(parameter[list(order)])
    return other


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_softened_it_is_the_mean_of_softened_probabilities(temperature: float) -> None:
    """Prevents the mean of probabilities at temperature 1, softened afterwards: another, sharper distribution."""
    teachers = [teacher(seed) for seed in range(3)]
    together = logits(Ensemble(teachers, [2, 1, 1], "probabilities", temperature))
    apart = [(logits(each) / temperature).softmax(-1) for each in teachers]
    expected = 0.5 * apart[0] + 0.25 * apart[1] + 0.25 * apart[2]
    torch.testing.assert_close((together / temperature).softmax(-1), expected, rtol=1e-10, atol=0)


def test_the_mean_of_logits_is_that() -> None:
    teachers = [teacher(seed) for seed in range(2)]
    together = logits(Ensemble(teachers, [3, 1], "logits", temperature=2.0))
    torch.testing.assert_close(together, 0.75 * logits(teachers[0]) + 0.25 * logits(teachers[1]))


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_one_teacher_twice_says_what_it_says_once(mean: Any) -> None:
    """Prevents a constant in the logits that the softmax does not see and the squared error does."""
    alone = teacher(0)
    torch.testing.assert_close(logits(Ensemble([alone, alone], [1, 2], mean, 2.0)), logits(alone))


def test_classes_are_matched_by_name() -> None:
    """Prevents the mean of one teacher's `good` and another's `bad`, where both were trained elsewhere."""
    first = teacher(0)
    second = permuted(first, [2, 0, 1])
    assert not torch.allclose(logits(first), logits(second))
    torch.testing.assert_close(logits(Ensemble([first, second])), logits(first))

    numbered = copy.deepcopy(first)
    numbered.config.id2label = {0: "0", 1: "1", 2: "2"}
    torch.testing.assert_close(logits(Ensemble([numbered, first])), logits(first))

    second.config.id2label = {0: "three", 1: "one", 2: "four"}
    with pytest.raises(InputError, match=r"predicts three, one, four, and .* one, two, three: they must be the same"):
        Ensemble([first, second])


def test_each_teacher_gets_what_it_takes_and_the_first_is_looked_into() -> None:
    """Prevents token types from reaching a DistilBERT, and hidden states of a teacher that no loss compares."""
    set_seed(1)
    config = DistilBertConfig(vocab_size=40, dim=8, n_layers=2, n_heads=2, hidden_dim=12, id2label=NAMES)
    both = Ensemble([teacher(0), DistilBertForSequenceClassification(config).double().eval()])
    outputs = both(TOKENS, torch.ones_like(TOKENS), torch.zeros_like(TOKENS), output_hidden_states=True)
    assert [state.shape for state in outputs.hidden_states] == [(2, 6, 16)] * 2
    # As the report runs it.
    (alone,) = LogitsOnly(both)(TOKENS)
    torch.testing.assert_close(alone, logits(both))


def test_an_ensemble_is_heard_through_the_command_line(
    reviews: dict[str, str],
    teacher: str,
    short_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prevents teachers, weights or a temperature that are asked for and not used, and a run that does not say whom
    it heard."""
    monkeypatch.setattr(_closing, "export_and_report", lambda *_, **__: Mock(to_text=str))
    monkeypatch.setattr(_closing, "write_card", Mock())
    first = AutoModelForSequenceClassification.from_pretrained(teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    second = permuted(first, [1, 0])
    with torch.no_grad():
        second.classifier.bias += torch.tensor([2.0, 0.0])
    other = str(tmp_path / "other")
    second.save_pretrained(other)
    tokenizer.save_pretrained(other)

    words = [word for pair in reviews.items() for word in pair]
    words += ["--teacher_name_or_path", teacher, other, "--student_layers", "0", *short_run]
    settings = ["--teacher_weights", "3", "1", "--temperature", "3", "--max_steps", "1", "--learning_rate", "0"]
    run = tmp_path / "run"
    assert main(["distill", *words, *settings, "--output_dir", str(run)]) == 0
    record = json.loads((run / "compression.json").read_text())
    assert record["recipe"]["teacher_name_or_path"] == [teacher, other]

    with open(reviews["--validation_file"], encoding="utf-8") as file:
        texts = [row["sentence"] for row in csv.DictReader(file)]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    student = AutoModelForSequenceClassification.from_pretrained(run)
    with torch.no_grad():
        p, q, r = ((m.double()(**inputs).logits / 3).softmax(-1) for m in (first, second, student))
    mean = 0.75 * p + 0.25 * q.flip(-1)
    expected = 9 * (mean * (mean / r).log()).sum(-1).mean().item()
    (evaluation,) = [entry for entry in record["training"] if "eval_loss" in entry]
    assert evaluation["eval_loss_soft_target"] == pytest.approx(expected, rel=1e-4)

    for flags, message in {
        ("--teacher_weights", "1"): "--teacher_weights gives 1 weights for 2 teachers",
        ("--teacher_weights", "1", "0"): "--teacher_weights 0.0 must be above 0",
        ("--finetune_teacher",): "--finetune_teacher trains one teacher",
    }.items():
        capsys.readouterr()
        assert main(["distill", *words, *flags, "--output_dir", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err
