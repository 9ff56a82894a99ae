"""Tiny teachers of every architecture and head that students are made from, and a batch to feed them."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY, LAYERS, PAD = 40, 5, 1

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "num_labels": 3,
}

# What an architecture needs besides, mostly to bring out what sets it apart.
_CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "DistilBert": {"dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": LAYERS},
    "Electra": {"embedding_size": 8},
    "MPNet": {},
    "DebertaV2": {
        "relative_attention": True,
        "position_buckets": 4,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "share_att_key": True,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "type_vocab_size": 0,
    },
    "ModernBert": {
        "local_attention": 4,
        "global_attn_every_n_layers": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "GPT2": {"n_positions": 32, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_inner": 24},
}

_NOT_OF_DISTILBERT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_NOT_OF_GPT2 = (*_NOT_OF_DISTILBERT, "max_position_embeddings")


def make_teacher(name: str, **config: Any) -> PreTrainedModel:
    """Builds, say, `BertForMaskedLM`, tiny, all weights random: norms and biases would else be 1 and 0."""
    with warnings.catch_warnings():
        # Some releases of transformers import DeBERTa-v2 through a torch.jit.script that torch deprecated.
        warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
        model_class = getattr(transformers, name)
    architecture = next(known for known in sorted(_CONFIGS, key=len, reverse=True) if name.startswith(known))
    aliases = {"DistilBert": _NOT_OF_DISTILBERT, "GPT2": _NOT_OF_GPT2}.get(architecture, ())
    sizes = {key: value for key, value in _SIZES.items() if key not in aliases}
    torch.manual_seed(0)
    teacher = model_class(model_class.config_class(**{**sizes, **_CONFIGS[architecture], **config}))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return teacher.eval()


HEADS = [
    *(f"{name}ForSequenceClassification" for name in _CONFIGS),
    *(f"{name}ForMaskedLM" for name in _CONFIGS if name != "GPT2"),
    "GPT2LMHeadModel",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small, a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=HEADS)
def teacher(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_teacher(request.param)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two texts, the second padded; longer than ModernBERT's local window, so that its layers differ."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(4, VOCABULARY, (2, 11), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 8:], attention_mask[1, 8:] = PAD, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def make() -> Any:
    return make_teacher
