"""Mutual learning: peers that teach one another, each of them as if it were alone with its teachers."""

import copy
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from prunelle.cli import main
from prunelle.compression.record import read_record
from prunelle.scripts import _closing
from prunelle.trainers import MutualArguments, MutualTrainer

LENGTH = 8
SIZES: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": LENGTH, "num_labels": 3, "initializer_range": 0.5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(layers: int, kind: Any = BertForSequenceClassification) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return kind(BertConfig(num_hidden_layers=layers, **sizes, **SIZES, **NO_DROPOUT)).double()


def three_peers() -> list[PreTrainedModel]:
    """Of two architectures, one of which takes no token types."""
    set_seed(0)
    sizes = {"dim": 12, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "dropout": 0.0, "attention_dropout": 0.0}
    other = DistilBertForSequenceClassification(DistilBertConfig(**sizes, seq_classif_dropout=0.0, **SIZES)).double()
    return [bert(1), bert(2), other]


def rows(count: int, tokens: bool = False) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(5, 40, (count, LENGTH), generator=draw)
    labels = torch.where(words % 3 == 0, words, -100) if tokens else torch.arange(count) % 3
    columns = {"input_ids": words, "attention_mask": torch.ones_like(words), "token_type_ids": torch.zeros_like(words)}
    return Dataset.from_dict({name: each.tolist() for name, each in (columns | {"labels": labels}).items()})


def train(folder: Path, peers: list[PreTrainedModel], tokens: bool = False, **arguments: Any) -> MutualTrainer:
    settings: dict[str, Any] = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    resumed = arguments.pop("resume_from_checkpoint", None)
    args = MutualArguments(output_dir=str(folder), **(settings | arguments))
    trainer = MutualTrainer(peers, args, train_dataset=rows(12, tokens), eval_dataset=rows(8, tokens))
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_against_a_naive_loop(tmp_path: Path, limit: float, accumulated: int) -> None:
    """Prevents a peer that pulls its teachers towards itself, divergences the wrong way round, and shared clipping."""
    peers = three_peers()
    naive = copy.deepcopy(peers)
    data = rows(12).with_format("torch")
    for step in range(3):
        batch = data[4 * step : 4 * step + 4]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = [peer.train()(**inputs).logits for peer in naive]
        for number, (peer, own) in enumerate(zip(naive, logits, strict=True)):
            targets = [F.softmax(other.detach(), -1) for k, other in enumerate(logits) if k != number]
            taught = [F.kl_div(F.log_softmax(own, -1), target, reduction="batchmean") for target in targets]
            (F.cross_entropy(own, batch["labels"]) + sum(taught) / 2).backward()
            if limit:
                assert nn.utils.clip_grad_norm_(peer.parameters(), limit) > limit
            with torch.no_grad():
                for parameter in peer.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
            peer.zero_grad()
    sizes = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    trainer = train(tmp_path, peers, max_grad_norm=limit, **sizes)
    for ours, theirs in zip(trainer.peers, naive, strict=True):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(
        sum(logged[f"loss_{term}_{number}"] for term in ("soft_target", "hard_label") for number in (1, 2, 3)), rel=1e-4
    )


def test_weights_and_the_temperature_move(tmp_path: Path) -> None:
    """Prevents --schedules from being taken and not followed."""
    flags = {"schedules": ["temperature:4:linear:0.5", "hard_label_weight:0:linear"], "max_steps": 4}
    trainer = train(tmp_path, three_peers(), **flags)
    logs = trainer.state.log_history[:4]
    assert [log["temperature"] for log in logs] == [1.0, 2.5, 4.0, 4.0]
    assert [log["hard_label_2_weight"] for log in logs] == [1.0, 0.75, 0.5, 0.25]
    assert logs[1]["loss"] == pytest.approx(
        sum(logs[1][f"loss_soft_target_{n}"] + 0.75 * logs[1][f"loss_hard_label_{n}"] for n in (1, 2, 3)), rel=1e-4
    )
    softer, _ = train(tmp_path, three_peers(), temperature=4.0, max_steps=1).state.log_history
    fixed, _ = train(tmp_path, three_peers(), max_steps=1).state.log_history
    assert logs[0]["loss_soft_target_1"] == pytest.approx(fixed["loss_soft_target_1"], rel=1e-6)
    assert softer["loss_soft_target_1"] != pytest.approx(fixed["loss_soft_target_1"], rel=1e-2)


def test_language_models_resume_to_the_bit(tmp_path: Path) -> None:
    """Prevents tied weights that cannot be written to a checkpoint, or are not read from it."""

    def pair() -> list[PreTrainedModel]:
        set_seed(0)
        return [bert(1, BertForMaskedLM), bert(1, BertForMaskedLM)]

    flags = {"optim": "adamw_torch", "distilled_positions": "all", "learning_rate": 1e-2}
    whole = train(tmp_path, pair(), True, save_strategy="steps", save_steps=2, **flags)
    resumed = train(tmp_path, pair(), True, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **flags)
    for ours, theirs in zip(resumed.peers, whole.peers, strict=True):
        assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
        assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.fixture
def words(reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path) -> list[str]:
    """Flags of a run of a trained peer and one from scratch."""
    sizes = {"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    config = json.dumps(sizes | {"max_position_embeddings": 64, "dropout": 0.0})
    named = ["--peer_name_or_path", teacher, "--peer_config", config, "--learning_rate", "1e-3"]
    return [*(w for pair in reviews.items() for w in pair), *short_run, *named, "--output_dir", str(tmp_path / "run")]


def test_the_best_peer_is_exported_and_all_are_kept(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents the export of a peer that happens to come first, and metrics of one peer under another's number."""
    closings = Mock(return_value=Mock(to_text=str))
    monkeypatch.setattr(_closing, "export_and_report", closings)
    monkeypatch.setattr(_closing, "write_card", Mock())
    assert main(["mutual", *words, "--num_train_epochs", "1"]) == 0
    record = read_record(tmp_path / "run")
    assert record is not None
    (last,) = [entry for entry in record["training"] if "eval_loss" in entry]
    assert last["eval_accuracy_1"] > 0.9 > last["eval_accuracy_2"]
    assert last["eval_loss_hard_label_1"] < last["eval_loss_hard_label_2"]
    assert record["peer"] == 1
    weights = [load_file(folder / "model.safetensors") for folder in (tmp_path / "run", tmp_path / "run" / "peer-1")]
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())
    assert json.loads((tmp_path / "run" / "peer-2" / "config.json").read_text())["model_type"] == "distilbert"
    assert closings.call_args.args[0].config.model_type == "bert"


def test_one_peer_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a run without anybody to learn from."""
    at = words.index("--peer_config")
    assert main(["mutual", *words[:at], *words[at + 2 :]]) == 2
    assert "give two peers or more" in capsys.readouterr().err


SPOILED = {
    "no labels": (["--hard_label_weight", "0"], "--hard_label_weight is 0: peers learn from the labels"),
    "no peers": (["--soft_target_weight", "0"], "--soft_target_weight is 0"),
}


@pytest.mark.parametrize(("change", "expected"), SPOILED.values(), ids=SPOILED)
def test_what_cannot_learn_is_refused(
    words: list[str], change: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents peers that agree on nothing in particular."""
    assert main(["mutual", *words, *change]) == 2
    assert expected in capsys.readouterr().err
