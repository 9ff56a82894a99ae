"""Biases that take back what rounding shifts on average."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunelle.compression.quantization import Quantization
from prunelle.compression.quantization.bias_correction import correcting_biases, output_means


def mean_outputs(model: nn.Module, names: Any, batch: Any) -> dict[str, Tensor]:
    """By name, in float64."""
    found: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        found[name] = output.detach().double().flatten(0, -2).mean(0)

    hooks = [model.get_submodule(name).register_forward_hook(partial(see, name)) for name in names]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_all_outputs_have_the_mean_that_they_had(uneven: Any, calibrated: Any, batch: Any, name: str) -> None:
    """Prevents modules that are corrected for what those before them lose no more, and biases of the wrong module."""
    model = uneven(name)
    exact = deepcopy(model)
    method = calibrated(model, Quantization("int8-static"))
    biased = [name for name, module in method.linear.items() if module.bias is not None]
    assert len(biased) > 4
    expected, found = (mean_outputs(each, biased, batch) for each in (exact, model))
    for name in biased:
        spread = expected[name].abs().max()
        torch.testing.assert_close(found[name] / spread, expected[name] / spread, rtol=0, atol=1e-5)
        assert not torch.equal(model.get_submodule(name).bias, exact.get_submodule(name).bias)


def test_a_bias_becomes_the_average_of_what_batches_lack() -> None:
    """Prevents a bias that only the last batch has a say in, or that adds up over batches."""
    torch.manual_seed(0)
    module = nn.Linear(6, 4)
    batches = [torch.randn(2, 5, 6) + number for number in range(3)]
    with output_means({"it": module}) as means:
        for rows in batches:
            module(rows)
    weight, bias = module.weight.detach().double(), module.bias.detach().double()
    module.weight.data += 0.1 * torch.randn(4, 6)
    with correcting_biases({"it": module}, means):
        for rows in batches:
            module(rows)
    lacking = [(rows.double() @ (weight - module.weight.detach().double()).T).mean((0, 1)) for rows in batches]
    torch.testing.assert_close(module.bias.detach().double(), bias + sum(lacking) / 3, rtol=1e-5, atol=1e-6)
