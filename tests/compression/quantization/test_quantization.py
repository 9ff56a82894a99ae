"""What quantization makes of weights and inputs, by naive arithmetic, and how it composes with masks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunelle.compression import bake
from prunelle.compression.pruning import CubicSchedule, Pruning
from prunelle.compression.quantization import DynamicInput, Int8Table, Int8Weight, Quantization
from prunelle.errors import InputError


def naive_uint8(values: np.ndarray) -> np.ndarray:
    """ONNX's DynamicQuantizeLinear and back, number by number."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    steps = [min(max(round(value / scale) + zero, 0), 255) - zero for value in values.flat]
    return np.array(steps).reshape(values.shape) * scale


@pytest.mark.parametrize("shift", [-9.0, -1.0, 0.0, 3.0])
@pytest.mark.parametrize("quantizer", [DynamicInput(), Int8Table()])
def test_unsigned_rounding_is_that_of_the_definition(quantizer: nn.Module, shift: float) -> None:
    """Prevents a zero point that is off by one, and a range that does not hold zero."""
    values = (torch.randn(7, 5, generator=torch.Generator().manual_seed(1)) + shift).double()
    torch.testing.assert_close(quantizer(values).numpy(), naive_uint8(values.numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("quantizer", [DynamicInput(), Int8Table()])
def test_a_symmetric_range_stays_in_8_bits(quantizer: nn.Module) -> None:
    """Prevents 256 as a level: half way between two, zero and the greatest value are both rounded up."""
    values = torch.tensor([[-1.0, 0.25, 1.0]])
    assert quantizer(values).max().item() == pytest.approx(127 * 2 / 255)


@pytest.mark.parametrize("quantizer", [DynamicInput(), Int8Table(), Int8Weight(1)])
def test_zeros_stay_zeros(quantizer: nn.Module) -> None:
    """Prevents NaN out of 0 / 0, where a batch, a table or an output has nothing but zeros."""
    assert torch.equal(quantizer(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("input_axis", [0, 1])
def test_each_output_has_64_steps_on_either_side(input_axis: int) -> None:
    """Prevents scales taken over the wrong axis, or over the whole matrix."""
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(2)).double()
    outputs = weight.T.numpy() if input_axis == 0 else weight.numpy()
    expected = np.stack([[round(w / (abs(row).max() / 64)) * abs(row).max() / 64 for w in row] for row in outputs])
    found = Int8Weight(input_axis)(weight)
    torch.testing.assert_close((found.T if input_axis == 0 else found).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(Int8Weight(input_axis)(found.float()), found.float()), "rounded once, it stays"


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_gradients_pass_straight_through(make: Any, batch: Any, name: str) -> None:
    """Prevents rounding's own gradient, which is zero, from stopping the training."""
    model = make(name)
    Quantization().attach(model)
    model(**batch).logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        if "key" not in key and "position" not in key and "token_type" not in key:  # those may well have none
            assert parameter.grad is not None, key
            assert parameter.grad.any(), key


def test_nothing_is_rounded_before_the_start(make: Any, batch: Any) -> None:
    """Prevents a delayed start that starts at once, or never."""
    model = make("BertForSequenceClassification")
    before = model(**batch).logits
    method = Quantization(start=0.5)
    method.attach(model)
    method.step(0.25)
    assert torch.equal(model(**batch).logits, before)
    with pytest.raises(RuntimeError, match="nothing was quantized"):
        method.finish()
    method.step(0.5)
    assert not torch.equal(model(**batch).logits, before)
    method.finish()


def test_a_mask_comes_before_the_quantizer(make: Any, batch: Any) -> None:
    """Prevents scales from weights that the mask takes away, and masked weights that rounding brings back."""
    model = make("BertForSequenceClassification")
    pruning, quantization = Pruning(CubicSchedule(0.3, 0, 0), "magnitude"), Quantization()
    for method in (pruning, quantization):
        method.attach(model)
        method.step(1.0)
    dense = model.bert.encoder.layer[0].output.dense
    kept = dense.parametrizations.weight.original * dense.parametrizations.weight[0].mask
    torch.testing.assert_close(dense.weight, Int8Weight(1)(kept), rtol=0, atol=0)
    assert not dense.weight[kept == 0].any()


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel", "DistilBertForMaskedLM"])
def test_what_is_baked_is_a_stock_model_on_the_grid(make: Any, batch: Any, name: str) -> None:
    """Prevents a checkpoint that only loads with quantizers, or whose scales the export would not find again."""
    model = make(name)
    stock = set(model.state_dict())
    method = Quantization()
    method.attach(model)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in method.plan.linear}
    bake(model)
    assert set(model.state_dict()) == stock
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    logits = model(**batch).logits
    again = Quantization()
    again.attach(model)
    again.quantizers = [quantizer for quantizer in again.quantizers if isinstance(quantizer, DynamicInput)]
    for quantizer in again.quantizers:
        quantizer.enabled = False
    torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-5)


def test_modules_are_chosen_by_pattern(make: Any) -> None:
    """Prevents a pattern that catches nothing, or more than it says."""
    method = Quantization(patterns=["*.attention.*", "classifier"], excluded=["*.0.*"], embeddings=False)
    method.attach(make("BertForSequenceClassification"))
    assert len(method.plan.linear) == 4 * 4 + 1
    assert not method.plan.embeddings
    with pytest.raises(InputError, match=r"the pattern \*\.atention\.\* matches none"):
        Quantization(patterns=["*.atention.*"]).attach(make("BertForSequenceClassification"))


def test_tied_weights_stay_as_they_are(make: Any) -> None:
    """Prevents a table whose rounding silently changes the head that shares it."""
    method = Quantization()
    method.attach(make("GPT2LMHeadModel"))
    assert method.plan.embeddings == ["transformer.wpe"]
    assert "lm_head" not in method.plan.linear
    with pytest.raises(InputError, match="lm_head shares its weight with "):
        Quantization(patterns=["lm_head"]).attach(make("GPT2LMHeadModel"))
