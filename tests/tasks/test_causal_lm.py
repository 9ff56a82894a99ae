"""Causal language modelling: the label at a position is the token that follows, shifted once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from prunelle.cli import main
from prunelle.tasks import TASKS, DataArguments, Task
from prunelle.tasks.tokenizer import train_causal_tokenizer
from prunelle.trainers import DistillationArguments, DistillationTrainer, FinetuningArguments
from prunelle.trainers.compression import hard_label_loss
from prunelle.trainers.finetuning import finetune, trainer_data
from prunelle.trainers.models import LoadedModel
from prunelle.trainers.terms import batch_of

LINES = [f"Line {number} of a Text that counts on to {number + 1}." for number in range(60)]
GPT2: dict[str, Any] = {
    "vocab_size": 300, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 24,
    "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip

BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES))
    return str(path)


def prepare(text: str) -> tuple[Task, Any, GPT2LMHeadModel, dict[str, Any]]:
    torch.manual_seed(0)
    task = TASKS["causal-lm"](
        DataArguments(task="causal-lm", train_file=text, validation_file=text, max_seq_length=24), 0
    )
    tokenizer = train_causal_tokenizer(LINES, 300)
    return task, tokenizer, GPT2LMHeadModel(GPT2Config(**GPT2, initializer_range=0.3)), task.encode(tokenizer)


def own_loss(model: GPT2LMHeadModel, batch: dict[str, Any]) -> Any:
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def test_blocks_are_text_with_its_ends(text: str) -> None:
    """Prevents lost case, special tokens around blocks, and documents that run into each other."""
    _, tokenizer, _, encoded = prepare(text)
    packed = [token for block in encoded["train"]["input_ids"] for token in block]
    separated = [t for ids in tokenizer(LINES)["input_ids"] for t in [*ids, tokenizer.eos_token_id]]
    assert packed == separated[: len(packed)]
    assert len(separated) - len(packed) < 24
    assert tokenizer.decode(packed[: len(tokenizer(LINES[0])["input_ids"])]) == LINES[0]


def test_labels_are_shifted_once(text: str) -> None:
    """Prevents a model that learns to repeat its input, or to skip a word."""
    task, tokenizer, model, encoded = prepare(text)
    batch = task.collator(tokenizer, encoded)([encoded["train"][n] for n in range(3)])
    ours = hard_label_loss(model(batch["input_ids"]), batch["labels"])
    torch.testing.assert_close(ours, own_loss(model, batch))


def test_finetuning_takes_the_step_of_the_models_own_loss(text: str, tmp_path: Path) -> None:
    """Prevents the Trainer, which takes a causal model's labels to be unshifted, from counting one too few a row."""
    task, tokenizer, model, encoded = prepare(text)
    encoded["train"] = encoded["train"].select(range(2))
    own_loss(model, task.collator(tokenizer, encoded)(list(encoded["train"]))).backward()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    arguments = FinetuningArguments(
        output_dir=str(tmp_path / "run"), optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_steps=1,
        max_grad_norm=0.0, per_device_train_batch_size=2, report_to="none", save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    finetune(LoadedModel(model, tokenizer, is_trained=True), task, encoded, arguments)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-6)


def test_a_student_learns_at_every_predicted_position(text: str, tmp_path: Path) -> None:
    """Prevents distillation at positions without a label, or a teacher and a student one word apart."""
    task, tokenizer, model, encoded = prepare(text)
    arguments = DistillationArguments(output_dir=str(tmp_path), report_to="none", dataloader_pin_memory=False)
    trainer = DistillationTrainer(
        model, GPT2LMHeadModel(model.config), arguments, **trainer_data(task, tokenizer, encoded)
    )
    batch = trainer.data_collator([encoded["train"][n] for n in range(3)])
    items = dict(zip(trainer.objective.terms, trainer.objective.count(batch_of(batch)).tolist(), strict=True))
    assert items == {"soft_target": 3 * 23, "hard_label": 3 * 23, "hidden_cosine": 3 * 24}
    metrics = trainer.evaluate()
    rows = encoded["validation"]
    losses = [own_loss(model, {"input_ids": torch.tensor([ids])}).item() for ids in rows["input_ids"]]
    assert metrics["eval_loss_hard_label"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    with torch.no_grad():
        guessed = model(torch.tensor(rows["input_ids"][:])).logits.argmax(-1)[:, :-1]
    right = guessed == torch.tensor(rows["input_ids"][:])[:, 1:]
    assert metrics["eval_accuracy"] == pytest.approx(right.float().mean().item())


def test_the_road_from_text_to_a_verified_file(text: str, tmp_path: Path) -> None:
    """Prevents a student whose file predicts other words than it does, and a checkpoint that cannot generate."""
    config = {"model_type": "gpt2", "vocab_size": 300, "max_position_embeddings": 24, "num_hidden_layers": 2}
    config |= {"hidden_size": 16, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    folder = tmp_path / "run"
    words = ["--task", "causal-lm", "--train_file", text, "--validation_file", text, "--max_seq_length", "24"]
    words += ["--teacher_config", json.dumps(config), "--finetune_teacher", "--student_layers", "1"]
    words += ["--max_steps", "3", "--save_strategy", "no", "--disable_tqdm", "true", "--output_dir", str(folder)]
    assert main(["distill", *words]) == 0
    report = {row["name"]: row for row in json.loads((folder / "report.json").read_text())["models"]}
    assert list(report) == ["teacher", "student", "onnx", "onnx-int8"]
    assert report["onnx"]["flips"]["count"] == 0
    assert report["onnx-int8"]["size_bytes"] < report["onnx"]["size_bytes"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 1
    prompt = tokenizer("Line 5", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3


def refused(words: list[str], text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether a run is refused because the model sees what it would have to predict."""
    data = ["--task", "causal-lm", "--train_file", text, "--validation_file", text, "--max_seq_length", "24"]
    data += ["--max_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true"]
    code, error = main([*words, *data, "--output_dir", str(folder / "run")]), capsys.readouterr().err
    return code == 2 and "sees the words that it would have to predict" in error


def test_models_that_see_what_they_would_predict_are_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents an encoder from reading off its labels, as a model to fine-tune, teacher, student or peer."""
    tokenizer = train_causal_tokenizer(LINES, 300)
    models = {"bert": BertForMaskedLM(BertConfig(**BERT)), "gpt2": GPT2LMHeadModel(GPT2Config(**GPT2))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    bert, causal = str(tmp_path / "bert"), str(tmp_path / "gpt2")
    from_scratch = json.dumps(BERT)
    for words in (
        ["finetune", "--model_config", from_scratch],
        ["distill", "--teacher_name_or_path", bert, "--student_layers", "0"],
        ["distill", "--teacher_name_or_path", causal, "--student_name_or_path", bert],
        ["distill", "--teacher_name_or_path", causal, "--student_config", from_scratch],
        ["mutual", "--peer_name_or_path", causal, bert],
    ):
        assert refused(words, text, tmp_path, capsys), words
    decoder = json.dumps(BERT | {"is_decoder": True})
    assert not refused(["finetune", "--model_config", decoder], text, tmp_path, capsys)
    assert (tmp_path / "run" / "model.safetensors").exists()
