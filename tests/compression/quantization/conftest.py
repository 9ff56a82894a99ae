"""Models with channels of unlike size, and methods that have seen a batch."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedModel

from prunelle.compression import CompressionMethod


@pytest.fixture
def uneven(make: Any) -> Callable[[str], PreTrainedModel]:
    """Models by class, with one large channel where a norm comes before."""

    def made(name: str) -> PreTrainedModel:
        model = make(name).eval()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.data[3] *= 50
        return model

    return made


@pytest.fixture
def calibrated(batch: Any) -> Callable[..., Any]:
    """The last of the methods, once all are attached and calibrated and have come to a share of the run."""

    def last(model: PreTrainedModel, *methods: CompressionMethod, progress: float = 1.0) -> CompressionMethod:
        for method in methods:
            method.attach(model)
        for method in methods:
            method.calibrate(model, lambda samples, after_batch: model(**batch) and None)
            method.step(progress)
        return methods[-1]

    return last
