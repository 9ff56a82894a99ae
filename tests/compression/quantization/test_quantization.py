"""What quantization makes of weights and inputs, by naive arithmetic, and how it composes with masks."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunelle.compression import bake
from prunelle.compression.pruning import CubicSchedule, Pruning
from prunelle.compression.quantization import (
    DynamicInput,
    Int4Weight,
    Int8Rows,
    Int8Table,
    Int8Weight,
    Quantization,
    QuantizationPlan,
    StaticInput,
    read_plan,
)
from prunelle.compression.quantization.rounding import round_within
from prunelle.compression.record import write_record
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


def naive_block(block: list[float], symmetric: bool) -> list[float]:
    """16 steps of one scale: 4 bits as onnxruntime stores them."""
    low, high = min(block), max(block)
    if symmetric:
        scale, zero = (high if abs(high) > abs(low) else low) / -8, 8
    else:
        scale = (max(high, 0) - min(low, 0)) / 15
        zero = round(-min(low, 0) / scale)
    return [(min(max(round(weight / scale) + zero, 0), 15) - zero) * scale for weight in block]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("input_axis", [0, 1])
def test_each_block_has_16_steps(input_axis: int, symmetric: bool) -> None:
    """Prevents blocks along the wrong axis, a last block that takes in padding, and a 17th step."""
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(2)).double()
    expected = [[w for n in (0, 4, 8) for w in naive_block(row[n : n + 4], symmetric)] for row in weight.tolist()]
    quantizer = Int4Weight(input_axis, block_size=4, symmetric=symmetric)
    found = quantizer(weight) if input_axis == 1 else quantizer(weight.T).T
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
    assert not Int4Weight(1, 4, symmetric)(torch.zeros(2, 8)).any()


def test_each_row_of_a_table_has_a_scale() -> None:
    """Prevents one long vector from making all others coarse."""
    table = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)).double() * torch.logspace(-3, 2, 5)[:, None]
    expected = [[round(v / max(map(abs, row)) * 127) * max(map(abs, row)) / 127 for v in row] for row in table.tolist()]
    torch.testing.assert_close(Int8Rows()(table), torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)


def test_gradients_of_a_learned_scale_are_those_of_the_paper() -> None:
    """Prevents a scale that is pulled the wrong way by what is clipped, gradients through clipped values, and channels
    whose division the scale does not know of.
    """
    values = (torch.randn(4, 6, generator=torch.Generator().manual_seed(4)) * 3).double().requires_grad_()
    scale = torch.tensor(0.02).double().requires_grad_()
    outward = torch.randn(4, 6, generator=torch.Generator().manual_seed(5)).double()
    divisors = torch.tensor([1.0, 7.7, 0.3, 2.0, 1.0, 0.9], dtype=torch.float64)
    (round_within(values, divisors, scale, torch.tensor(-100.0), torch.tensor(155.0)) * outward).sum().backward()
    to_scale, to_values = 0.0, []
    for value, weight, by in zip(
        values.flatten().tolist(), outward.flatten().tolist(), divisors.tolist() * 4, strict=True
    ):
        steps = value / by / 0.02
        clipped = min(max(round(steps), -100), 155)
        inside = -100.5 <= steps <= 155.5
        to_scale += weight * by * (clipped - steps if inside else clipped)
        to_values.append(weight if inside else 0.0)
    assert 0 < sum(not gradient for gradient in to_values) < 24
    torch.testing.assert_close(values.grad.flatten(), torch.tensor(to_values).double())
    assert scale.grad.item() == pytest.approx(to_scale / (255 * 6) ** 0.5, rel=1e-5)


def test_static_ranges_are_moving_averages_until_they_freeze() -> None:
    """Prevents ranges that evaluation data move, that move to the end of the run, or that begin at zero."""
    quantizer = StaticInput(2)
    quantizer.calibrating = True
    quantizer(torch.tensor([[-1.0, 3.0]]))
    assert (quantizer.low.item(), quantizer.high.item()) == (-1.0, 3.0)
    assert quantizer.scale.item() == pytest.approx(4 / 255)
    assert quantizer.zero.item() == 64
    quantizer.calibrating, quantizer.enabled, quantizer.observing = False, True, True
    rounded = quantizer.train()(torch.tensor([[-2.0, 4.0]]))
    assert (quantizer.low.item(), quantizer.high.item()) == pytest.approx((-1.1, 3.1))
    assert rounded.max().item() == pytest.approx(3.1, abs=0.02)
    for change in ({"training": False}, {"observing": False}):
        vars(quantizer).update({"training": True, "observing": True} | change)
        quantizer(torch.tensor([[-9.0, 9.0]]))
        assert quantizer.high.item() == pytest.approx(3.1)


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


def test_static_ranges_are_wanted_before_the_first_step(make: Any) -> None:
    """Prevents a loop without calibration from rounding everything to whole numbers."""
    method = Quantization("int8-static")
    method.attach(make("BertForSequenceClassification"))
    with pytest.raises(RuntimeError, match="have to be calibrated before the first step"):
        method.step(0.0)


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
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in method.plan().linear}
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
    method = Quantization(patterns=["*.attention.*", "classifier"], excluded=["*.0.*"], embeddings="none")
    method.attach(make("BertForSequenceClassification"))
    assert len(method.plan().linear) == 4 * 4 + 1
    assert not method.plan().tables
    with pytest.raises(InputError, match=r"the pattern \*\.atention\.\* matches none"):
        Quantization(patterns=["*.atention.*"]).attach(make("BertForSequenceClassification"))


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Prevents an export of a saved model that rounds otherwise than the one that closed its run."""
    plan = QuantizationPlan("int8-static", ["classifier"], ["embeddings"], inputs={"classifier": (0.1, 3)})
    assert read_plan(tmp_path) is None
    write_record(tmp_path, quantization=asdict(plan))
    assert read_plan(tmp_path) == plan
    write_record(tmp_path, quantization=asdict(plan) | {"smoothing": {}})
    with pytest.raises(InputError, match=r"compression\.json has smoothing under quantization, which this version"):
        read_plan(tmp_path)


def test_tied_weights_stay_as_they_are(make: Any) -> None:
    """Prevents a table whose rounding silently changes the head that shares it."""
    method = Quantization()
    method.attach(make("GPT2LMHeadModel"))
    assert method.plan().tables == ["transformer.wpe"]
    assert "lm_head" not in method.plan().linear
    with pytest.raises(InputError, match="lm_head shares its weight with "):
        Quantization(patterns=["lm_head"]).attach(make("GPT2LMHeadModel"))
