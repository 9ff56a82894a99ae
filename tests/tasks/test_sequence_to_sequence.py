"""Sequence-to-sequence: what is asked of the decoder, what is compared, and what the models then write."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from prunelle.cli import main
from prunelle.errors import InputError
from prunelle.export import report_on_sequences
from prunelle.scripts import _closing
from prunelle.tasks import DataArguments, SequenceToSequence, metrics
from prunelle.tasks.tokenizer import train_sequence_tokenizer
from prunelle.trainers import DistillationArguments, DistillationTrainer
from prunelle.trainers.compression import hard_label_loss
from prunelle.trainers.distillation import check_pair
from prunelle.trainers.ensemble import Ensemble
from prunelle.trainers.finetuning import trainer_data
from prunelle.trainers.terms import batch_of

WORDS = ["red", "Green", "blue", "cold", "warm", "small", "Tall", "old"]
PAIRS = [(f"{a} {b} {c}", " ".join([b, a, c][: 1 + len(c) % 3])) for a in WORDS for b in WORDS[:4] for c in WORDS[:3]]
T5: dict[str, Any] = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "dropout_rate": 0.0}
T5 |= {"num_layers": 2, "num_decoder_layers": 2}
BART: dict[str, Any] = {"vocab_size": 300, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0}
BART |= {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"document": text, "summary": target}) for text, target in PAIRS))
    return str(path)


def prepare(pairs: str, family: str = "t5") -> tuple[SequenceToSequence, Any, Any, dict[str, Any]]:
    torch.manual_seed(0)
    arguments = DataArguments(
        task="sequence-to-sequence", train_file=pairs, validation_file=pairs, max_seq_length=16, max_target_length=12
    )
    task = SequenceToSequence(arguments, 0)
    tokenizer = train_sequence_tokenizer(task.texts(), 300)
    config = T5Config(**T5, pad_token_id=1, eos_token_id=2) if family == "t5" else BartConfig(**BART)
    task.configure(config)
    model = {"t5": T5ForConditionalGeneration, "bart": BartForConditionalGeneration}[family](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return task, tokenizer, model, task.encode(tokenizer)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_loss_is_the_models_own(pairs: str, family: str) -> None:
    """Prevents a decoder that is shown the token it has to write, or starts from another than when it generates."""
    task, tokenizer, model, encoded = prepare(pairs, family)
    examples = [encoded["train"][n] for n in (0, 19, 50)]
    batch = task.collator(tokenizer, encoded)(examples)
    labels = batch.pop("labels")
    assert (labels == -100).any(), "no target is padded"
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    outputs = model(**batch)
    asked = labels != -100
    torch.testing.assert_close(outputs.logits[asked], expected.logits[asked])
    torch.testing.assert_close(hard_label_loss(outputs, labels), expected.loss)
    assert model.generation_config.decoder_start_token_id == batch["decoder_input_ids"][0, 0]


def test_targets_keep_their_case_and_end(pairs: str) -> None:
    """Prevents a student that never stops, or that writes in lower case what it was shown otherwise."""
    task, tokenizer, _, encoded = prepare(pairs)
    for (text, target), example in zip(PAIRS, encoded["train"], strict=True):
        assert tokenizer.decode(example["input_ids"], skip_special_tokens=True).strip() == text
        assert tokenizer.decode(example["labels"], skip_special_tokens=True).strip() == target
        assert example["labels"][-1] == tokenizer.eos_token_id
    task.arguments.source_prefix = "sort: "
    prefixed = task.encode(tokenizer)["train"][0]
    assert tokenizer.decode(prefixed["input_ids"], skip_special_tokens=True).strip().startswith("sort: red red red")
    assert prefixed["labels"] == encoded["train"][0]["labels"]


def test_terms_run_over_what_is_written(pairs: str, tmp_path: Path) -> None:
    """Prevents terms on the tokens of the text that is read, or on padding of the target."""
    task, tokenizer, model, encoded = prepare(pairs)
    arguments = DistillationArguments(
        output_dir=str(tmp_path), hidden_mse_weight=1.0, report_to="none", dataloader_pin_memory=False
    )
    other = T5ForConditionalGeneration(model.config)
    trainer = DistillationTrainer(other, model, arguments, **trainer_data(task, tokenizer, encoded))
    batch = trainer.data_collator([encoded["train"][n] for n in (0, 19, 50)])
    written = sum(len(encoded["train"][n]["labels"]) for n in (0, 19, 50))
    assert set(trainer.objective.count(batch_of(batch)).tolist()) == {written}
    _, outputs = trainer.compute_loss(other.eval(), dict(batch), return_outputs=True)
    features = {k: v for k, v in batch.items() if k in trainer.teacher_inputs and k != "labels"}
    hidden = [m(**features, output_hidden_states=True).decoder_hidden_states for m in (other, model)]
    mask = batch["labels"] != -100
    cosine = torch.nn.functional.cosine_similarity(hidden[0][-1][mask], hidden[1][-1][mask], dim=-1)
    seen = trainer.means["eval"].pop(trainer.accelerator)
    assert seen["hidden_cosine"] == pytest.approx((1 - cosine).mean().item(), rel=1e-4)
    squared = [(a[mask] - b[mask]).square().mean().item() for a, b in zip(hidden[0][1:], hidden[1][1:], strict=True)]
    assert seen["hidden_mse"] == pytest.approx(sum(squared) / 2, rel=1e-4)
    assert outputs["logits"].shape[:2] == batch["labels"].shape


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_road_from_pairs_to_a_student_that_writes(
    pairs: str, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a student that stock classes cannot load or generate with, and metrics of texts nobody wrote."""
    monkeypatch.setattr(_closing, "report_on_sequences", partial(report_on_sequences, latency_seconds=0))
    folder = tmp_path / "run"
    config = {"model_type": family, **(T5 if family == "t5" else BART)}
    words = ["--task", "sequence-to-sequence", "--train_file", pairs, "--validation_file", pairs]
    words += ["--max_seq_length", "16", "--max_target_length", "12", "--max_eval_samples", "20"]
    words += ["--teacher_config", json.dumps(config), "--finetune_teacher", "--student_decoder_layers", "0"]
    words += ["--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true", "--output_dir", str(folder)]
    if family == "bart":
        words += [
            "--teacher_cache",
            str(tmp_path / "cache"),
            "--teacher_cache_top_k",
            "20",
            "--hidden_cosine_weight",
            "0",
        ]
    assert main(["distill", *words]) == 0
    report = {row["name"]: row for row in json.loads((folder / "report.json").read_text())["models"]}
    assert list(report) == ["teacher", "student"]
    assert {"accuracy", "loss", "rougeL", "exact_match"} == set(report["student"]["metrics"])
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(model.get_decoder().block if family == "t5" else model.get_decoder().layers) == 1
    texts = [text for text, _ in PAIRS[:20]]
    targets = [target for _, target in PAIRS[:20]]
    longest = max(len(ids) for ids in tokenizer(targets)["input_ids"])
    ids = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=longest)
    written = tokenizer.batch_decode(ids, skip_special_tokens=True)
    expected = metrics.compute([metrics.RougeL, metrics.ExactMatch], written, targets)
    assert {name: report["student"]["metrics"][name] for name in expected} == pytest.approx(expected)


def test_rouge_l_against_a_naive_one() -> None:
    """Prevents a score that looks right on equal texts and wrong on all others."""

    def longest(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return longest(a[:-1], b[:-1]) + 1
        return max(longest(a[:-1], b), longest(a, b[:-1]))

    draw = np.random.default_rng(0)
    texts = [list(draw.choice(["a", "b", "c", "d"], size=draw.integers(1, 8))) for _ in range(60)]
    expected = [
        2 * longest(a, b) / (len(a) + len(b)) if longest(a, b) else 0.0
        for a, b in zip(texts[::2], texts[1::2], strict=True)
    ]
    found = metrics.compute(
        [metrics.RougeL], [" ".join(text) for text in texts[::2]], [" ".join(text) for text in texts[1::2]]
    )
    assert found["rougeL"] == pytest.approx(np.mean(expected))
    # By hand: police the gunman / police killed the gunman (Lin, 2004): 3 shared words of 3 and 4.
    one = metrics.compute([metrics.RougeL], ["Police the gunman."], ["police killed the gunman"])
    assert one["rougeL"] == pytest.approx(6 / 7)
    assert metrics.compute([metrics.RougeL], ["", "x"], ["a", "b"])["rougeL"] == 0.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--target_column_name": "document"}, "cannot be both the text and the target"),
        ({"--target_column_name": "sumary"}, "no column 'sumary' in .* the nearest is 'summary'"),
        ({"--max_target_length": "40"}, "--max_target_length 40 is more than the 32 positions"),
        ({"--attention_weight": "1"}, "has an encoder and a decoder: give them 0"),
        ({"--student_decoder_layers": "7"}, "student decoder layer 7 does not exist"),
        ({"--student_decoder_layers": "x"}, "--student_decoder_layers x must be numbers"),
    ],
)
def test_what_cannot_be_is_one_line(
    pairs: str, tmp_path: Path, flags: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents an hour of training before the mistake shows."""
    config = {"model_type": "bart", **BART, "max_position_embeddings": 32}
    given = {
        "--task": "sequence-to-sequence", "--train_file": pairs, "--validation_file": pairs,
        "--max_seq_length": "16", "--max_target_length": "12", "--teacher_config": json.dumps(config),
        "--student_decoder_layers": "0", "--output_dir": str(tmp_path / "run"), **flags,
    }  # fmt: skip
    assert main(["distill", "--finetune_teacher", *(word for pair in given.items() for word in pair)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_decoders_that_start_alike_are_needed(pairs: str, tmp_path: Path) -> None:
    """Prevents a student that learns behind the teacher's first token and generates behind its own."""
    task, _, teacher, _ = prepare(pairs)
    student = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0))
    arguments = DistillationArguments(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(InputError, match="student's decoder starts from token 0 and the teacher's from 1"):
        check_pair(student, teacher, arguments)
    bart = BartConfig(**BART)
    task.configure(bart)
    assert bart.decoder_start_token_id == 1


def test_several_teachers_do_not_write_one_text(pairs: str) -> None:
    _, _, teacher, _ = prepare(pairs)
    with pytest.raises(InputError, match="several encoder-decoders do not write one text"):
        Ensemble([teacher, teacher])


def test_a_missing_target_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("text,target\na text,what follows\nanother,\n")
    arguments = DataArguments(task="sequence-to-sequence", train_file=str(path), validation_file=str(path))
    with pytest.raises(InputError, match=r"pairs\.csv, example 2: column 'target' holds no text"):
        SequenceToSequence(arguments, 0)


def test_an_encoder_decoder_is_not_exported(pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a file of half a model."""
    _, tokenizer, model, _ = prepare(pairs)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "onnx")]
    assert main(["export", *words]) == 2
    assert "is T5ForConditionalGeneration: only models named" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()
