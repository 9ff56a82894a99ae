"""Weights that make up for what others lose by rounding, against the textbook's inverses."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunelle.compression.pruning import CubicSchedule, Pruning
from prunelle.compression.quantization import Quantization
from prunelle.compression.quantization.compensation import compensated


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def correlated(inputs: int) -> Tensor:
    """(rows, inputs), some inputs much larger than others."""
    return drawn(400, inputs) @ drawn(inputs, inputs, seed=1) * torch.linspace(0.1, 3, inputs)


def naive(weight: Tensor, gram: Tensor, end: int) -> Tensor:
    """Optimal brain quantization of one row at a time: what is left is inverted anew for every weight."""
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    found = weight.clone()
    for number, row in enumerate(weight):
        largest = row.abs().max()
        left, values = sorted(range(len(row)), key=lambda n: -gram[n, n].item()), row.clone()
        while left:
            inverse = gram[left][:, left].inverse()
            first = left[0]
            if row[first].abs() == largest or row[first] == 0:
                found[number, first] = row[first]
            else:
                found[number, first] = values[first].clamp(-largest, largest)
            rounded = (found[number, first] * end / largest).round() * largest / end
            values[left] -= (values[first] - rounded) / inverse[0, 0] * inverse[:, 0]
            left = left[1:]
    return found


def rounded(weight: Tensor, end: int = 64) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / end
    return (weight / scale).round() * scale


def test_weights_are_those_of_the_textbook() -> None:
    """Prevents a wrong factor of the inverse, another order, blocks that do not tell one another what they lost, and
    pruned weights that come back.
    """
    inputs = 150
    rows, weight = correlated(inputs), drawn(3, inputs, seed=2)
    weight[1, ::3] = 0
    gram = rows.T @ rows
    found = compensated(weight, gram, 7)
    torch.testing.assert_close(found, naive(weight, gram, 7), rtol=1e-8, atol=1e-8)
    assert not found[1, ::3].any()


def test_products_lose_less_and_scales_stay() -> None:
    """Prevents scales that a file does not find again, and weights beyond the end of their grid."""
    rows, weight = correlated(60), drawn(9, 60, seed=2)
    weight[:, 5] *= 3  # the largest of most rows
    found = compensated(weight.float(), rows.T @ rows, 64).double()
    weight = weight.float().double()
    assert torch.equal(found.abs().amax(1), weight.abs().amax(1))
    before, after = ((rows @ (rounded(each) - weight).T).square().mean() for each in (weight, found))
    assert after < 0.5 * before


def test_inputs_of_zero_and_rows_of_zero_do_no_harm() -> None:
    """Prevents numbers that are none where an input, or an output's weights, are all zero."""
    weight = drawn(4, 6)
    weight[1] = 0
    assert torch.equal(rounded(compensated(weight, torch.zeros(6, 6), 64))[[0, 2, 3]], rounded(weight)[[0, 2, 3]])
    assert not compensated(weight, torch.zeros(6, 6), 64)[1].any()


def original(module: Any) -> Tensor:
    """(outputs, inputs)"""
    weight = module.parametrizations["weight"].original.detach()
    return weight.clone() if isinstance(module, nn.Linear) else weight.T.clone()


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_every_module_makes_up_for_its_own_inputs(uneven: Any, calibrated: Any, batch: Any, name: str) -> None:
    """Prevents Gram matrices of the wrong module, of inputs not divided as in the file, and transposed weights."""
    model = uneven(name)
    before = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "weight")
    }
    seen: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, arguments: Any) -> None:
        seen[name] = arguments[0].detach().flatten(0, -2)

    hooks = [
        module.register_forward_pre_hook(partial(see, name))
        for name, module in model.named_modules()
        if name in before and not isinstance(module, nn.Embedding)
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    method = calibrated(model, Quantization("int8-static"))
    divided = method.plan().divisors
    assert divided
    for name, module in method.linear.items():
        divisors = torch.tensor(divided.get(name, [1.0] * seen[name].shape[1]))
        gram = seen[name].T @ seen[name] / torch.outer(divisors, divisors)
        weight = before[name] if isinstance(module, nn.Linear) else before[name].T
        expected = compensated(weight * divisors, gram, 64) / divisors
        torch.testing.assert_close(original(module), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(original(module), weight)


def test_what_is_pruned_or_rounded_later_is_left_alone(make: Any, calibrated: Any) -> None:
    """Prevents masked weights that come back, and weights and biases that make up for a loss that there is not yet."""
    for methods in (
        [Quantization("int8-static", start=0.5)],
        [Pruning(CubicSchedule(0.3, 0, 0), "magnitude"), Quantization("int8-static")],
    ):
        model = make("BertForSequenceClassification").eval()
        weight, bias = model.classifier.weight.detach().clone(), model.classifier.bias.detach().clone()
        method = calibrated(model, *methods, progress=0.0)
        assert torch.equal(original(method.linear["classifier"]), weight)
        assert torch.equal(model.classifier.bias, bias)
