"""Training without dropout."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    set_seed,
)

from prunelle.cli import main
from prunelle.trainers import DistillationTrainer, SelfDistillationArguments
from prunelle.trainers.models import disable_dropout


@pytest.mark.parametrize(
    ("model_type", "rates"),
    [
        ("bert", ["hidden_dropout_prob", "attention_probs_dropout_prob"]),
        ("bart", ["dropout", "attention_dropout", "activation_dropout", "classifier_dropout"]),
        ("modernbert", ["embedding_dropout", "mlp_dropout", "attention_dropout", "classifier_dropout"]),
        ("gpt2", ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
    ],
)
def test_no_dropout_is_left(model_type: str, rates: list[str]) -> None:
    """Prevents noise in training from a rate that is held elsewhere than in nn.Dropout, and a configuration that says
    another rate than the model was given."""
    set_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "decoder_start_token_id": 1}
    settings = sizes | tokens | {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    config = AutoConfig.for_model(model_type, **settings, **dict.fromkeys(rates, 0.5))
    noisy = AutoModelForSequenceClassification.from_config(config).train()
    words = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 2]])
    assert not torch.equal(noisy(input_ids=words).logits, noisy(input_ids=words).logits)
    disable_dropout(noisy)
    assert torch.equal(noisy(input_ids=words).logits, noisy(input_ids=words).logits)
    assert [getattr(noisy.config, rate) for rate in rates] == [0.5] * len(rates)


@pytest.mark.parametrize("without", [True, False])
def test_a_model_is_its_own_equal_without_dropout(without: bool, tmp_path: Path) -> None:
    """Prevents a flag that trainers of students do not heed, and noise in what a model learns from itself."""
    set_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=24, hidden_dropout_prob=0.5))
    words = torch.randint(5, 40, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": w, "attention_mask": [1] * 6, "labels": n % 2} for n, w in enumerate(words)]
    arguments = SelfDistillationArguments(
        output_dir=str(tmp_path), soft_target_loss="mse", hard_label_weight=0.0, hidden_cosine_weight=0.0, max_steps=1,
        logging_steps=1, report_to="none", save_strategy="no", dataloader_pin_memory=False,
        **({} if without else {"disable_dropout": False}),
    )  # fmt: skip
    trainer = DistillationTrainer(student, copy.deepcopy(student), arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    assert (trainer.state.log_history[0]["loss"] < 1e-12) == without


def test_fine_tuning_without_dropout_draws_nothing(
    reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path
) -> None:
    """Prevents a flag that does nothing: of all examples at once, every seed then makes the same."""
    noisy = AutoModelForSequenceClassification.from_pretrained(teacher, hidden_dropout_prob=0.5)
    noisy.save_pretrained(tmp_path / "noisy")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "noisy")
    words = [word for pair in reviews.items() for word in pair]
    words += ["--model_name_or_path", str(tmp_path / "noisy"), *short_run]
    words += ["--per_device_train_batch_size", "256", "--max_steps", "2", "--optim", "sgd", "--learning_rate", "0.1"]

    def trained(seed: str, without: str) -> torch.Tensor:
        folder = tmp_path / f"{seed}-{without}"
        more = ["--output_dir", str(folder), "--seed", seed, "--disable_dropout", without]
        assert main(["finetune", *words, *more]) == 0
        return load_file(folder / "model.safetensors")["bert.encoder.layer.0.intermediate.dense.weight"]

    torch.testing.assert_close(trained("1", "true"), trained("2", "true"), rtol=0, atol=1e-6)
    assert (trained("1", "false") - trained("2", "false")).abs().max() > 1e-5
