"""Examples without labels, on which the teacher alone speaks: several labels, numbers and words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, set_seed

from prunelle.tasks import TASKS, DistillationDataArguments
from prunelle.tasks.tokenizer import train_tokenizer
from prunelle.trainers import DistillationArguments, DistillationTrainer
from prunelle.trainers.finetuning import trainer_data

WORDS = ["one", "two", "three"]
# Of a text of one word the tokens are as many as the labels: their shapes are alike.
PROBLEMS: dict[str, dict[str, Any]] = {
    "multi_label_classification": {"labels": [["a"], ["b", "c"], []], "texts": WORDS, "task": "text-classification"},
    "regression": {"labels": [-1.5, 0.0, 2.0], "texts": WORDS, "task": "text-classification"},
    "token-classification": {
        "labels": [["A", "O"], ["O", "O"], ["O", "A"]],
        "texts": [["one", "twofold"], ["threefold", "one"], ["two", "three"]],
        "task": "token-classification",
    },
}


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL, of rows of logits at a temperature of 2."""
    return 4 * F.kl_div(ours.div(2).log_softmax(-1), theirs.div(2).log_softmax(-1), log_target=True, reduction="sum")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_teacher_speaks_where_there_is_no_label(problem: str, tmp_path: Path) -> None:
    """Prevents marks of missing labels that are learned as numbers or classes, and examples that nobody learns from.

    Of three examples that are labelled and three that are not, each is a batch: an accumulated step is over all six.
    """
    given = PROBLEMS[problem]
    names = ("tokens", "tags") if problem == "token-classification" else ("text", "label")
    labelled = [dict(zip(names, row, strict=True)) for row in zip(given["texts"], given["labels"], strict=True)]
    for name, rows in {"train": labelled, "more": [{names[0]: row[names[0]]} for row in labelled]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {f"{split}_file": str(tmp_path / "train.jsonl") for split in ("train", "validation")}
    kind = {} if problem == "token-classification" else {"problem_type": problem}
    task: Any = TASKS[given["task"]](
        DistillationDataArguments(task=given["task"], **files, **kind, unlabeled_file=str(tmp_path / "more.jsonl")), 0
    )
    tokenizer = train_tokenizer(WORDS, 270)
    encoded = task.encode(tokenizer)
    assert encoded["unlabeled"].features == encoded["train"].features  # so that the two can be joined
    inputs = [torch.tensor([row["input_ids"]]) for row in encoded["train"]]

    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes |= {"intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, initializer_range=0.5)
    task.configure(config)
    auto = BertForTokenClassification if problem == "token-classification" else BertForSequenceClassification
    set_seed(0)
    student, teacher = auto(config).double().eval(), auto(config).double().eval()
    arguments = DistillationArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=6,
        max_steps=1,
        learning_rate=0.0,
        hidden_cosine_weight=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    with torch.no_grad():
        said = [(student(ids).logits[0], teacher(ids).logits[0]) for ids in inputs]
    labels = [torch.tensor(row["labels"]) for row in encoded["train"]]
    if problem == "regression":
        soft = torch.stack([(ours - theirs).square().mean() for ours, theirs in said]).mean()
        hard = torch.stack([(ours - label).square() for (ours, _), label in zip(said, labels, strict=True)]).mean()
    elif problem == "multi_label_classification":
        assert inputs[0].shape[1] == len(task.class_names)
        choices = [[torch.stack([torch.zeros_like(each), each], -1) for each in pair] for pair in said]
        soft = sum(divergence(*pair) for pair in choices) / 9
        ours, asked = torch.stack([pair[0] for pair in said]), torch.stack(labels).double()
        hard = F.binary_cross_entropy_with_logits(ours, asked)
    else:
        # The teacher is heard at the first token of each word, and nowhere else.
        first = [label != -100 for label in labels]
        assert all(len(label) > 4 and places.sum() == 2 for label, places in zip(labels[:2], first[:2], strict=True))
        soft = sum(divergence(ours[at], theirs[at]) for (ours, theirs), at in zip(said, first, strict=True)) / 6
        hard = sum(F.cross_entropy(ours, label, reduction="sum") for (ours, _), label in zip(said, labels, strict=True))
        hard = hard / 6

    trainer = DistillationTrainer(student, teacher, arguments, **trainer_data(task, tokenizer, encoded))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss_soft_target"] == pytest.approx(float(soft), rel=1e-5)
    assert logged["loss_hard_label"] == pytest.approx(float(hard), rel=1e-5)
