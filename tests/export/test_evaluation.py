import math

import numpy as np
import pytest
import torch

from prunelle.errors import InputError
from prunelle.export import Runner, evaluate


class Canned(Runner):
    """Gives the logits that the batch holds under its own name."""

    format = "torch"
    size_bytes = parameters = 0
    input_names = ()

    def __init__(self, name):
        self.name = name

    def __call__(self, batch):
        return np.asarray(batch[self.name], dtype=np.float32)


A, B = Canned("a"), Canned("b")


def accuracy(predictions, references):
    assert predictions.shape == references.shape
    scored = references != -100
    return {"accuracy": (predictions == references)[scored].mean()}


def test_figures_by_hand():
    """Sums over batches of uneven size: a mean of means would weigh the small batch more."""
    batches = [
        {"labels": [0, 1], "a": [[2.0, 0.0], [0.0, 2.0]], "b": [[2.0, 0.0], [1.0, 0.0]]},
        {"labels": torch.tensor([1]), "a": [[2.0, 0.0]], "b": [[2.5, 0.0]]},
    ]
    first, second = evaluate([A, B], iter(batches), accuracy, reference=A)
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert first.metrics == pytest.approx({"accuracy": 2 / 3, "loss": (2 * right + wrong) / 3})
    assert (first.flips, first.total, first.max_abs_logit_difference) == (0, 3, 0.0)
    assert second.metrics["accuracy"] == pytest.approx(1 / 3)
    assert (second.flips, second.total, second.max_abs_logit_difference) == (1, 3, 2.0)


def test_the_reference_need_not_come_first():
    """Flips counted against whichever model is first would praise a bad student for resembling itself."""
    batches = [{"labels": [0], "a": [[1.0, 0.0]], "b": [[0.0, 1.0]]}]
    first, second = evaluate([A, B], batches, accuracy, reference=B)
    assert (first.flips, second.flips) == (1, 0)


def test_ignored_positions_count_nowhere():
    """Language models differ wildly at padding, which is not read and must not be counted."""
    logits = np.zeros((2, 3, 4), dtype=np.float32)
    logits[0, 1, 2] = 5.0
    other = logits + 100.0 * np.array([[[1], [0], [1]], [[1], [1], [1]]]) * np.eye(4)[3]
    batches = [
        {"labels": [[-100, 2, -100], [-100, -100, -100]], "a": logits, "b": other},
        {"labels": [[-100, -100, -100]] * 2, "a": logits, "b": other},
    ]
    for result in evaluate([A, B], batches, accuracy, reference=A):
        assert (result.flips, result.total, result.max_abs_logit_difference) == (0, 1, 0.0)
        assert result.metrics["accuracy"] == 1.0


def test_broken_logits_show():
    """A maximum that drops NaN would report a broken file as a perfect one."""
    batches = [{"labels": [0], "a": [[1.0, 0.0]], "b": [[math.nan, 0.0]]}] * 2
    _, broken = evaluate([A, B], batches, accuracy, reference=A)
    assert math.isnan(broken.max_abs_logit_difference)
    assert math.isnan(broken.metrics["loss"])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no labelled example"),
        ([{"labels": [-100], "a": [[0.0, 1.0]], "b": [[0.0, 1.0]]}], "no labelled example"),
        ([{"a": [[0.0]], "b": [[0.0]]}], "has no labels"),
        ([{"labels": [0.5], "a": [[0.0]], "b": [[0.0]]}], "class numbers"),
        ([{"labels": [2], "a": [[0.0, 1.0]], "b": [[0.0, 1.0]]}], "not among the 2 classes of a"),
        ([{"labels": [[0, 1]], "a": [[0.0, 1.0]], "b": [[0.0, 1.0]]}], "logits of shape"),
        ([{"labels": [0], "a": [[0.0, 1.0]], "b": [[0.0, 1.0, 2.0]]}], "b has 3 classes, a has 2"),
    ],
)
def test_data_that_cannot_be_evaluated(batches, message):
    """Broadcasting would turn each of these into figures that look right."""
    with pytest.raises(InputError, match=message):
        evaluate([A, B], batches, accuracy, reference=A)
