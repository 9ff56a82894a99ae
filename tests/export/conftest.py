"""Tiny random models, and their exports, made once a session since tracing takes seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedModel

from prunelle.export import export_onnx


@dataclass
class Exported:
    model: PreTrainedModel
    file: Path


@dataclass
class Tokenizer:
    """What of a tokenizer the export reads."""

    model_input_names: tuple[str, ...] = ("input_ids", "token_type_ids", "attention_mask")
    model_max_length: int = 48


def bert(kind: type[PreTrainedModel] = BertForSequenceClassification, layers: int = 1) -> PreTrainedModel:
    torch.manual_seed(layers)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        initializer_range=0.2,  # large enough for attention to be more than a mean
        num_labels=3,
    )
    return kind(config).eval()


@pytest.fixture
def make_bert() -> Callable[..., PreTrainedModel]:
    return bert


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = bert()
    return Exported(model, export_onnx(model, tmp_path_factory.mktemp("classifier") / "model.onnx"))


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = bert(BertForMaskedLM)
    return Exported(model, export_onnx(model, tmp_path_factory.mktemp("language") / "model.onnx"))
