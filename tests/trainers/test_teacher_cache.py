"""The teacher cache: the same student as with its teacher, and no answer that belongs to something else."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    set_seed,
)

from prunelle.compression import student_from_layers
from prunelle.errors import InputError
from prunelle.trainers import DistillationArguments, DistillationTrainer, teacher_cache

VOCABULARY, LENGTH = 40, 12
SIZES = {"vocab_size": VOCABULARY, "initializer_range": 0.5, "num_labels": 3}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TEACHERS: dict[str, Any] = {
    "classification": BertForSequenceClassification,
    "tokens": BertForTokenClassification,
    "masked LM": BertForMaskedLM,
    "causal LM": GPT2LMHeadModel,
}


def pair(task: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    set_seed(0)
    teacher = TEACHERS[task](
        GPT2Config(**SIZES, **GPT, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0)
        if task == "causal LM"
        else BertConfig(**SIZES, **BERT, **NO_DROPOUT, max_position_embeddings=LENGTH)
    )
    return student_from_layers(teacher, [0]), teacher


def rows(count: int, task: str, seed: int = 0) -> Dataset:
    """Random rows of uneven length, padded; where tokens have labels, an uneven number of them."""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        words = torch.randint(5, VOCABULARY, (LENGTH,), generator=draw)
        mask = torch.arange(LENGTH) < 3 + number % 9
        asked = {
            "tokens": (words % 3, mask & (words % 4 > 0)),
            "masked LM": (words, mask & (words % 4 == 0)),
            "causal LM": (words.roll(-1), mask),
        }
        labels = torch.where(asked[task][1], asked[task][0], -100).tolist() if task in asked else number % 3
        examples.append(
            {"input_ids": (words * mask).tolist(), "attention_mask": mask.long().tolist(), "labels": labels}
        )
    return Dataset.from_list(examples)


def trainer(folder: Path, task: str, **arguments: Any) -> DistillationTrainer:
    student, teacher = pair(task)
    (folder / "teacher").mkdir(parents=True, exist_ok=True)
    if not (folder / "teacher" / "config.json").is_file():
        teacher.save_pretrained(folder / "teacher")
    data = {
        "train_dataset": arguments.pop("train_dataset", rows(30, task)),
        "eval_dataset": arguments.pop("eval_dataset", rows(6, task, seed=1)),
    }
    settings: dict[str, Any] = {
        # Not Adam, which makes steps of the rounding of gradients that are 0, such as those of key biases.
        "optim": "sgd",
        "learning_rate": 1e-2,
        "max_steps": 12,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "hidden_cosine_weight": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return DistillationTrainer(
        student,
        arguments.pop("teacher", teacher),
        DistillationArguments(output_dir=str(folder / "run"), **(settings | arguments)),
        teacher_folders=[str(folder / "teacher")],
        **data,
    )


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": ("classification", {}),
    "classification, decoupled": ("classification", {"soft_target_loss": "decoupled"}),
    "classification, grouped by length": ("classification", {"train_sampling_strategy": "group_by_length"}),
    "tokens": ("tokens", {}),
    "masked LM": ("masked LM", {}),
    "masked LM, all positions": ("masked LM", {"distilled_positions": "all"}),
    "causal LM": ("causal LM", {"dataloader_num_workers": 1}),
    "causal LM, all positions, reverse": (
        "causal LM",
        {"distilled_positions": "all", "soft_target_loss": "reverse_kl"},
    ),
    "causal LM, accumulated": ("causal LM", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
}


@pytest.mark.parametrize(("task", "way"), WAYS.values(), ids=WAYS)
def test_cached_answers_train_as_the_teacher_does(tmp_path: Path, task: str, way: dict[str, Any]) -> None:
    """Prevents answers to other examples or positions, and a number format that teaches something else."""
    taught = trainer(tmp_path, task, **way)
    before = [weight.clone() for weight in weights(taught)]
    taught.train()
    cached = trainer(tmp_path, task, teacher_cache=str(tmp_path / "cache"), teacher_cache_top_k=VOCABULARY, **way)
    cached.train()
    assert cached.teacher is None
    for ours, theirs in zip(weights(cached), weights(taught), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert max((now - then).abs().max() for now, then in zip(weights(taught), before, strict=True)) > 1e-3
    assert cached.evaluate()["eval_loss_soft_target"] == pytest.approx(
        taught.evaluate()["eval_loss_soft_target"], rel=1e-5
    )


def weights(trained: DistillationTrainer) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in trained.model.parameters()]


def test_the_cut_cache_is_the_top_k_loss(tmp_path: Path) -> None:
    """Prevents a cut tail from being left out of the loss, where the student could put its weight unseen."""
    cut = trainer(tmp_path, "causal LM", teacher_cache=str(tmp_path / "cache"), teacher_cache_top_k=5)
    cut.train()
    whole = trainer(tmp_path, "causal LM", soft_target_loss="top_k", soft_target_top_k=5)
    whole.train()
    for ours, theirs in zip(weights(cut), weights(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    stored = Dataset.from_file(str(tmp_path / "cache" / "00000.arrow"))
    assert len(stored) == 36
    assert stored.features["log_probabilities"].feature.feature.dtype == "float16"
    attended = [sum(mask) - 1 for mask in cut.train_dataset["attention_mask"]]
    assert [len(positions) for positions in stored["indices"][:30]] == pytest.approx(attended, abs=1)


def test_a_build_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents paying for the same answers twice, and half a file from passing for a whole one."""
    monkeypatch.setattr(teacher_cache, "EXAMPLES_PER_SHARD", 8)
    _, teacher = pair("classification")
    asked: list[int] = []
    patience = 20

    def count(module: Any, inputs: Any, keywords: dict[str, Any]) -> None:
        asked.append(len(keywords["input_ids"]))
        if sum(asked) > patience:
            raise KeyboardInterrupt

    teacher.register_forward_pre_hook(count, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        trainer(
            tmp_path,
            "classification",
            teacher=teacher,
            teacher_cache=str(tmp_path / "cache"),
            per_device_eval_batch_size=4,
        )
    assert sum(asked) == 24
    found = {path.name for path in (tmp_path / "cache").iterdir()}
    assert found == {"00000.arrow", "00001.arrow", teacher_cache.RECORD_NAME}

    asked.clear()
    patience = 100
    resumed = trainer(tmp_path, "classification", teacher=teacher, teacher_cache=str(tmp_path / "cache"))
    assert sum(asked) == 36 - 16
    resumed.train()
    taught = trainer(tmp_path, "classification")
    taught.train()
    for ours, theirs in zip(weights(resumed), weights(taught), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    asked.clear()
    trainer(tmp_path, "classification", teacher=teacher, teacher_cache=str(tmp_path / "cache"))
    assert asked == []


@pytest.mark.parametrize("spoiled", [b"", b"no table", None], ids=["empty", "junk", "of other examples"])
def test_a_spoiled_shard_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: bytes | None
) -> None:
    """Prevents a full disk of one run from ending the next in its first step, and answers to other examples."""
    monkeypatch.setattr(teacher_cache, "EXAMPLES_PER_SHARD", 8)
    cache = tmp_path / "cache"
    whole = trainer(tmp_path, "classification", teacher_cache=str(cache))
    last = (cache / "00004.arrow").read_bytes()
    whole.train()
    (cache / "00001.arrow").write_bytes(last if spoiled is None else spoiled)
    teacher_cache._open.cache_clear()  # as in another process
    again = trainer(tmp_path, "classification", teacher_cache=str(cache))
    again.train()
    assert all(torch.equal(one, other) for one, other in zip(weights(again), weights(whole), strict=True))


def test_another_question_is_refused(tmp_path: Path) -> None:
    """Prevents a student from learning what another teacher said, or the same one of other data."""
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_top_k": 40}
    trainer(tmp_path, "causal LM", **cache)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    others: dict[str, dict[str, Any]] = {
        "distilled_positions": {"distilled_positions": "all"},
        "top_k, temperature": {"teacher_cache_top_k": 5},
        "training data, examples": {"train_dataset": rows(29, "causal LM")},
        "evaluation data": {"eval_dataset": rows(6, "causal LM", seed=2)},
    }
    for named, flags in others.items():
        with pytest.raises(InputError, match=f"other in: {named}; give another --teacher_cache"):
            trainer(tmp_path, "causal LM", **(cache | flags))
    _, other = pair("causal LM")
    with torch.no_grad():
        other.transformer.wte.weight[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="other in: teacher; give another --teacher_cache"):
        trainer(tmp_path, "causal LM", **cache)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
    with pytest.raises(InputError, match="holds something else"):
        trainer(tmp_path, "causal LM", teacher_cache=str(tmp_path / "teacher"))
    (tmp_path / "cache" / teacher_cache.RECORD_NAME).write_text("{")
    with pytest.raises(InputError, match="is not JSON: give another --teacher_cache"):
        trainer(tmp_path, "causal LM", **cache)
    with pytest.raises(InputError, match="/proc/cache cannot be written to"):
        trainer(tmp_path, "causal LM", teacher_cache="/proc/cache")


def test_what_a_cache_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Prevents terms that fall silent, and masks of one epoch with the answers to another's."""
    cache = {"teacher_cache": str(tmp_path / "cache")}
    with pytest.raises(InputError, match="give --hidden_cosine_weight 0 --relation_weight 0, or"):
        trainer(tmp_path, "classification", **cache, hidden_cosine_weight=1.0, relation_weight=1.0)
    with pytest.raises(InputError, match="at one temperature"):
        trainer(tmp_path, "classification", **cache, schedules=["temperature:1:linear"])
    with pytest.raises(InputError, match="nothing to keep"):
        trainer(tmp_path, "classification", **cache, soft_target_weight=0.0)
    with pytest.raises(InputError, match="give --teacher_cache_top_k 40"):
        trainer(tmp_path, "causal LM", **cache, teacher_cache_top_k=5, soft_target_loss="mse")
    with pytest.raises(InputError, match=r"masks that stay.* add --static_masking"):
        trainer(tmp_path, "causal LM", **cache, train_dataset=rows(4, "causal LM").remove_columns("labels"))
    assert not (tmp_path / "cache").exists()


TWO_PROCESSES = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from prunelle.trainers import teacher_cache
from test_teacher_cache import rows, trainer, weights

teacher_cache.EXAMPLES_PER_SHARD = 8
folder, written = Path(sys.argv[1]), []
write = teacher_cache.TeacherCache.write
teacher_cache.TeacherCache.write = lambda cache, shard, answers: (written.append(shard), write(cache, shard, answers))
settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "train_dataset": rows(28, "tokens")}
cached = trainer(folder, "tokens", teacher_cache=str(folder / "cache"), **settings)
assert len(written) == (3, 2)[cached.args.process_index], written
cached.train()
tensors = {str(number): weight.clone() for number, weight in enumerate(weights(cached))}
save_file(tensors, folder / f"weights-{cached.args.process_index}")
"""


def test_two_processes_share_the_questions_out(tmp_path: Path) -> None:
    """Prevents each process from asking everything, and answers that land beside other examples than in one."""
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    trainer(tmp_path, "tokens")  # writes the teacher
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parent)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, tmp_path / "two.py", tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    one = trainer(tmp_path, "tokens", train_dataset=rows(28, "tokens"))
    one.train()
    for process in range(2):
        found = load_file(tmp_path / f"weights-{process}")
        for number, expected in enumerate(weights(one)):
            torch.testing.assert_close(found[f"{number}"], expected, rtol=0, atol=1e-5)
