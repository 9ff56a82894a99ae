"""Ternary and binary weights: what they are, how their scales learn, and in how little they are stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from prunelle.compression import bake
from prunelle.compression.pruning import CubicSchedule, Pruning
from prunelle.compression.quantization import (
    BinaryWeight,
    Int8Weight,
    Quantization,
    TernaryWeight,
    load_packed,
    save_packed,
)
from prunelle.compression.quantization.packing import pack, unpack
from prunelle.errors import InputError


def naive(row: list[float], ternary: bool) -> list[float]:
    small = 0.7 * sum(map(abs, row)) / len(row) if ternary else -1.0
    large = [abs(w) for w in row if abs(w) > small]
    scale = sum(large) / len(large)
    return [0.0 if abs(w) <= small else (-scale if w < 0 else scale) for w in row]


@pytest.mark.parametrize("kind", [TernaryWeight, BinaryWeight])
@pytest.mark.parametrize("input_axis", [0, 1])
def test_weights_begin_as_in_the_papers(kind: Any, input_axis: int) -> None:
    """Prevents a threshold or a scale over the wrong axis, and a scale that counts what became zero."""
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.tensor([naive(row, kind is TernaryWeight) for row in weight.tolist()]).double()
    given = weight if input_axis == 1 else weight.T
    found = kind(given, input_axis)(given)
    torch.testing.assert_close(found if input_axis == 1 else found.T, expected, rtol=1e-6, atol=1e-7)
    single = found.detach().float()
    assert torch.equal(Int8Weight(input_axis)(single), single), "int8 holds it exactly"


@pytest.mark.parametrize("kind", [TernaryWeight, BinaryWeight])
def test_gradients_reach_weights_and_scales(kind: Any) -> None:
    """Prevents weights that can never change their sign, and scales that stay where they began."""
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    outward = torch.randn(3, 7, generator=torch.Generator().manual_seed(2)).double()
    quantizer = kind(weight, 1)
    (quantizer(weight) * outward).sum().backward()
    assert torch.equal(weight.grad, outward)
    signs = quantizer.signs(weight.detach())
    expected = [sum(o * s for o, s in zip(*rows, strict=True)) / 7**0.5 for rows in zip(outward, signs, strict=True)]
    torch.testing.assert_close(quantizer.scale.grad.flatten(), torch.stack(expected))


@pytest.mark.parametrize(("bits", "count"), [(1, 17), (2, 9), (4, 5)])
def test_what_is_packed_comes_back(bits: int, count: int) -> None:
    """Prevents numbers that overlap, or a last byte that is lost."""
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(3))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize(("scheme", "bits"), [("ternary", 2), ("binary", 1)])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_a_model_is_stored_in_few_bits(
    make: Any, batch: Any, tmp_path: Path, name: str, scheme: Any, bits: int
) -> None:
    """Prevents a stored model that predicts something else, and one whose weights still take bytes."""
    model: PreTrainedModel = make(name)
    method = Quantization(scheme, activations="int8")
    method.attach(model)
    assert len(method.parameter_groups()[0]["params"]) == len(method.linear)
    plan = method.plan()
    bake(model)
    save_packed(model, plan, tmp_path / "packed.safetensors")
    tensors = load_packed(tmp_path / "packed.safetensors")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensors[key], tensor), key
    again = make(name, initializer_range=0.5)
    again.load_state_dict(tensors)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    weights = sum(model.get_submodule(linear).weight.numel() for linear in plan.linear)
    others = sum(t.nbytes for key, t in model.state_dict().items() if key.removesuffix(".weight") not in plan.linear)
    assert (tmp_path / "packed.safetensors").stat().st_size < weights * bits / 8 + 1.5 * others + 20_000


def test_masked_weights_are_not_made_binary(make: Any) -> None:
    """Prevents pruned weights from coming back, since binary weights have no zero."""
    model = make("BertForSequenceClassification")
    Pruning(CubicSchedule(0.3, 0, 0), "magnitude").attach(model)
    Quantization("ternary").attach(model)
    with pytest.raises(InputError, match="is pruned, and binary weights have no zero"):
        Quantization("binary").attach(model)
