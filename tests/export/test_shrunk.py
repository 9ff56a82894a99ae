"""Models whose layers have sizes of their own, down to none, become ONNX files like any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    DistilBertConfig,
    GPT2Config,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedModel,
    RobertaConfig,
)

from prunelle.cli import main
from prunelle.compression import from_pretrained
from prunelle.compression.anatomy import dissect, matrix
from prunelle.compression.pruning import shrink
from prunelle.export import export_onnx
from prunelle.export.runner import OnnxRunner

SIZES: dict[str, Any] = {"vocab_size": 300, "initializer_range": 0.2}
WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}


@torch.no_grad()
def shrunk(model: PreTrainedModel) -> PreTrainedModel:
    """A layer without heads and half of its FFN, and one with its last head and without FFN."""
    first, second, *_ = dissect(model)
    matrix(first.heads.consumer[1])[:] = 0
    matrix(first.ffn.consumer[1])[:, :32] = 0
    matrix(second.heads.consumer[1])[:, second.heads.inputs(range(second.heads.count - 1))] = 0
    matrix(second.ffn.consumer[1])[:] = 0
    small = shrink(model.eval())
    assert [(layer.heads.count, layer.ffn.count) for layer in dissect(small)][:2] == [(0, 32), (1, 0)]
    return small


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("MPNetForSequenceClassification", MPNetConfig(**SIZES, **WIDTHS)),
        ("ModernBertForSequenceClassification", ModernBertConfig(**SIZES, **WIDTHS, **SPECIAL)),
        ("GPT2LMHeadModel", GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=48)),
        pytest.param(
            "RobertaForSequenceClassification",
            RobertaConfig(**SIZES, **WIDTHS, type_vocab_size=1),
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            "DistilBertForSequenceClassification", DistilBertConfig(**SIZES, **DISTILBERT), marks=pytest.mark.matrix
        ),
    ],
)
def test_the_file_computes_what_the_pruned_model_did(name: str, config: Any, tmp_path: Path) -> None:
    """Prevents empty matrices that onnxruntime refuses, and a choice of heads that is lost in tracing."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    small = shrunk(model)
    file = export_onnx(small, tmp_path / "model.onnx")
    words = torch.arange(3, 13)[None]
    logits = OnnxRunner(file, "onnx", parameters=0)({"input_ids": words, "attention_mask": torch.ones_like(words)})
    with torch.no_grad():
        expected = model(words).logits
    torch.testing.assert_close(torch.as_tensor(logits), expected, rtol=0, atol=1e-4)


def test_a_shrunk_folder_is_trained_and_compared(
    teacher: str, reviews: dict[str, str], short_run: list[str], tmp_path: Path
) -> None:
    """Prevents commands that build stock layers and refuse the weights."""
    small, tuned, compared = (str(tmp_path / name) for name in ("small", "tuned", "compared"))
    shrunk(from_pretrained(teacher)).save_pretrained(small)
    transformers.AutoTokenizer.from_pretrained(teacher).save_pretrained(small)
    data = [word for pair in reviews.items() for word in pair]
    run = [*short_run, "--max_steps", "2", "--output_dir", tuned]
    assert main(["finetune", *data, "--model_name_or_path", small, *run]) == 0
    assert [(layer.heads.count, layer.ffn.count) for layer in dissect(from_pretrained(tuned))][:2] == [(0, 32), (1, 0)]
    models = ["--reference", teacher, "--candidates", tuned, "--shapes", "1x8", "--latency_seconds", "0.1"]
    test_file = ["--test_file", reviews["--test_file"], "--max_seq_length", "24"]
    assert main(["compare", *models, *test_file, "--output_dir", compared]) == 0
