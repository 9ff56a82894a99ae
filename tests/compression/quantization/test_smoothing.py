"""Channels of unlike size, divided before they are rounded."""

from typing import Any

import pytest
import torch
from torch import Tensor

from prunelle.compression.pruning import CubicSchedule, Pruning
from prunelle.compression.quantization import Int8Weight, Quantization, StaticInput
from prunelle.compression.quantization.inputs import NAME
from prunelle.compression.quantization.smoothing import channel_divisors

DIVISORS = [1.0, 7.7, 0.3, 2.0, 1.0]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("input_axis", [0, 1])
def test_weights_are_rounded_as_multiplied(input_axis: int) -> None:
    """Prevents scales of the weights as they were, and weights left multiplied."""
    weight = drawn(3, 5)
    expected = []
    for row in weight.tolist():
        multiplied = [value * divisor for value, divisor in zip(row, DIVISORS, strict=True)]
        scale = max(map(abs, multiplied)) / 64
        expected.append([round(each / scale) * scale / by for each, by in zip(multiplied, DIVISORS, strict=True)])
    quantizer = Int8Weight(input_axis, torch.tensor(DIVISORS, dtype=torch.float64))
    found = quantizer(weight if input_axis == 1 else weight.T.contiguous())
    found = found if input_axis == 1 else found.T
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_inputs_are_rounded_as_divided() -> None:
    """Prevents a range of the channels as they were, and inputs left divided."""
    values = drawn(4, 5)
    quantizer = StaticInput(5).double()
    quantizer.divisors.copy_(torch.tensor(DIVISORS, dtype=torch.float64))
    quantizer.calibrating = True
    quantizer(values)
    quantizer.calibrating, quantizer.enabled = False, True
    divided = [[value / by for value, by in zip(row, DIVISORS, strict=True)] for row in values.tolist()]
    low, high = min(map(min, divided)), max(map(max, divided))
    scale = (high - low) / 255
    expected = [[round(v / scale) * scale * by for v, by in zip(row, DIVISORS, strict=True)] for row in divided]
    torch.testing.assert_close(
        quantizer.eval()(values), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=scale / 100
    )


def test_divisors_spare_much_of_the_error_or_are_none() -> None:
    """Prevents a choice that makes products worse."""
    rows, weight = drawn(200, 16).float(), drawn(8, 16, seed=1).float()
    assert channel_divisors(rows, rows.amin(0), rows.amax(0), weight) is None
    rows[:, 3] *= 60
    divisors = channel_divisors(rows, rows.amin(0), rows.amax(0), weight)
    assert divisors is not None

    def error(by: Tensor) -> float:
        quantizer = StaticInput(16)
        quantizer.divisors.copy_(by)
        quantizer.calibrating = True
        quantizer(rows)
        quantizer.calibrating, quantizer.enabled = False, True
        return float((quantizer(rows) @ Int8Weight(1, by)(weight).T - rows @ weight.T).square().mean())

    assert error(divisors) < 0.5 * error(torch.ones(16))


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_whoever_reads_an_input_divides_it_alike(uneven: Any, calibrated: Any, batch: Any, name: str) -> None:
    """Prevents three divisions of one input where one will do, and weights and inputs that no longer fit together."""
    model = uneven(name)
    exact = model(**batch).logits
    method = calibrated(model, Quantization("int8-static", embeddings="none"))
    smoothing = method.plan().divisors
    if name.startswith("Bert"):
        attention = "bert.encoder.layer.0.attention.self"
        assert smoothing[f"{attention}.query"] == smoothing[f"{attention}.key"] == smoothing[f"{attention}.value"]
    assert len(smoothing) >= 3
    for module in smoothing:
        linear = model.get_submodule(module)
        assert torch.equal(linear.parametrizations.weight[-1].divisors, getattr(linear, NAME).divisors)
    rounded = model(**batch).logits
    for module in method.linear.values():
        module.parametrizations.weight[-1].divisors.fill_(1)
        getattr(module, NAME).divisors.fill_(1)
    method.calibrated = False
    method.is_pruned = True
    method.calibrate(model, lambda samples, after_batch: model(**batch) and None)
    method.step(1.0)
    assert (rounded - exact).square().mean() < 0.7 * (model(**batch).logits - exact).square().mean()


def test_what_is_used_twice_is_left_alone(uneven: Any, calibrated: Any) -> None:
    """Prevents a module from being scaled for one of its inputs."""
    model = uneven("BertForSequenceClassification")
    first, second = model.bert.encoder.layer[:2]
    second.intermediate.dense = first.intermediate.dense
    smoothing = calibrated(model, Quantization("int8-static")).plan().divisors
    assert smoothing
    assert not any("layer.0.intermediate" in name for name in smoothing)


def test_pruned_models_are_left_alone(uneven: Any, calibrated: Any) -> None:
    """Prevents divisors for channels that shrinking takes out afterwards."""
    model = uneven("BertForSequenceClassification")
    pruning = Pruning(CubicSchedule(0.3, 0, 0), "magnitude")
    assert not calibrated(model, pruning, Quantization("int8-static")).plan().divisors
