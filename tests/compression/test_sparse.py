"""Zeros that are not stored come back, and every other number as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import prunelle
from prunelle.compression.pruning import shrink
from prunelle.compression.sparse import SPARSE_NAME, store_sparse


def pruned(density: float, dtype: torch.dtype = torch.float32, width: int = 128) -> PreTrainedModel:
    """A fifth of the values that are kept are negative zeros, infinite or not a number."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width}
    model = BertForMaskedLM(BertConfig(vocab_size=300, max_position_embeddings=64, **sizes)).to(dtype).eval()
    odd = torch.tensor([-0.0, float("inf"), float("nan")], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < density).add_(0.0)
            kept = parameter.nonzero()
            some = kept[torch.rand(len(kept)) < 0.2]
            parameter[tuple(some.T)] = odd[torch.arange(len(some)) % 3]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_checkpoint_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Prevents zeros for numbers, the wrong place or sign for a number, and heads that are no longer tied."""
    model = pruned(0.1, dtype)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    store_sparse(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", SPARSE_NAME]
    again, loading = prunelle.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(loading.values()), loading
    assert not again.training
    assert again.name_or_path == str(tmp_path)
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    before = model.state_dict()
    for name, weight in again.state_dict().items():
        assert weight.dtype == dtype
        assert torch.equal(weight.view(integers), before[name].view(integers)), name
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        BertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("density", [0.03, 0.1, 0.5])
def test_the_size_is_that_of_what_is_kept(density: float, tmp_path: Path) -> None:
    """Prevents indices that take more room than the zeros did."""
    model = pruned(density, width=384)
    model.save_pretrained(tmp_path)
    dense = (tmp_path / "model.safetensors").stat().st_size
    weights = load_file(tmp_path / "model.safetensors")
    kept = sum(int((weight.view(torch.int32) != 0).sum()) for weight in weights.values())
    share = kept / sum(weight.numel() for weight in weights.values())
    store_sparse(tmp_path)
    assert (tmp_path / SPARSE_NAME).stat().st_size <= (share + 1 / 32) * 1.03 * dense


def test_a_later_checkpoint_in_the_folder_counts(tmp_path: Path) -> None:
    """Prevents weights of an earlier run that come back without a word."""
    for density in (0.1, 0.5):
        model = pruned(density)
        model.save_pretrained(tmp_path)
        if density == 0.1:
            store_sparse(tmp_path)
    expected = model.cls.predictions.transform.dense.weight.count_nonzero()
    for again in (False, True):
        if again:
            store_sparse(tmp_path)
        loaded, loading = prunelle.from_pretrained(str(tmp_path), output_loading_info=True)
        assert not any(loading.values()), loading
        assert loaded.cls.predictions.transform.dense.weight.count_nonzero() == expected


def test_weights_without_zeros_are_stored_as_they_are(tmp_path: Path) -> None:
    """Prevents a file that grows: a bit for each number buys nothing there."""
    model = pruned(0.98)
    model.save_pretrained(tmp_path)
    dense = (tmp_path / "model.safetensors").stat().st_size
    store_sparse(tmp_path)
    assert (tmp_path / SPARSE_NAME).stat().st_size < dense * 1.01
    assert not [name for name in load_file(tmp_path / SPARSE_NAME) if name.endswith("dense.weight.bits")]


def test_a_packed_model_writes_as_it_was_told_to(tmp_path: Path) -> None:
    """Prevents texts of another length, or drawn from other tokens, than those of the same model unpacked."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, eos_token_id=3, bos_token_id=2))
    model.generation_config.update(max_length=37, do_sample=True, top_k=3)
    model.save_pretrained(tmp_path)
    stock = GPT2LMHeadModel.from_pretrained(tmp_path).generation_config.to_dict()
    store_sparse(tmp_path)
    loaded = prunelle.from_pretrained(str(tmp_path)).generation_config.to_dict()
    assert (loaded["max_length"], loaded["top_k"]) == (37, 3)
    assert loaded == stock
    (tmp_path / "generation_config.json").unlink()
    assert prunelle.from_pretrained(str(tmp_path)).generation_config.max_length != 37


def test_a_shrunk_model_is_packed_too(tmp_path: Path) -> None:
    """Prevents layers of stock size for weights that have none."""
    model = pruned(0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0.0, 0.0, 0.0)
        model.bert.encoder.layer[0].output.dense.weight[:, :64] = 0
    small = shrink(model)
    small.save_pretrained(tmp_path)
    store_sparse(tmp_path)
    again = prunelle.from_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["layer_shapes"][0]["ffn"] == 192
    for name, weight in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
