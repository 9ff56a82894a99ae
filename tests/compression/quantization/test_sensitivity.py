"""Which modules are sensitive, on a model of which one cannot be quantized."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from prunelle.compression.quantization import Quantization, SensitivityTest


@pytest.fixture
def fragile(make: Any) -> PreTrainedModel:
    """A model whose head has large weights on an input that is always zero: they make its scale too coarse."""
    model = make("BertForSequenceClassification")
    with torch.no_grad():
        model.bert.pooler.dense.weight[3], model.bert.pooler.dense.bias[3] = 0, 0
        words = torch.randint(4, 40, (64, 11), generator=torch.Generator().manual_seed(0))
        model.classifier.bias -= model(input_ids=words).logits.mean(0)  # so that all classes are predicted
        model.classifier.weight[:, 3] = 1e4
    return model


@pytest.fixture
def batches(fragile: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Labelled as the model predicts; the last label does not count."""
    words = torch.randint(4, 40, (3, 8, 11), generator=torch.Generator().manual_seed(1))
    found = [{"input_ids": rows, "labels": fragile(input_ids=rows).logits.argmax(-1)} for rows in words]
    found[-1]["labels"][-1] = -100
    return found


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_what_cannot_be_quantized_is_found_and_left_out(
    fragile: PreTrainedModel, batches: list[dict[str, torch.Tensor]], scheme: Any
) -> None:
    """Prevents a ranking by anything but predictions, and a left-out module that would have done no harm."""
    before = fragile(input_ids=batches[0]["input_ids"]).logits
    test = SensitivityTest(fragile, Quantization(scheme), batches)
    assert test.accuracy == 1.0
    order = test.one_by_one()
    assert len(order) == len(test.modules) == 5 * 6 + 2
    worst, *others = order
    assert worst.name == "classifier"
    assert worst.accuracy == pytest.approx(1 - worst.flips / 23)
    assert worst.flips > 3
    assert worst.kl > 10 * max(each.kl for each in others)
    assert test.left_out(drop=0.1, order=order) == ["classifier"]
    assert test.left_out(drop=1.0, order=order) == []
    assert torch.equal(fragile(input_ids=batches[0]["input_ids"]).logits, before), "the model itself stays"


def test_divergence_is_that_of_the_definition(fragile: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> None:
    """Prevents the divergence of the other direction, and a sum for a mean."""
    test = SensitivityTest(fragile, Quantization(), batches)
    worst = test.one_by_one()[0]
    p, q = test.reference.double().exp(), test.predict([worst.name]).double().exp()
    naive = sum(a * (a / b).log() for row, other in zip(p, q, strict=True) for a, b in zip(row, other, strict=True))
    assert worst.kl == pytest.approx(naive.item() / len(p), rel=1e-4)
