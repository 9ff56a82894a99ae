"""What is left of a model's weights."""

from collections.abc import Iterable

from torch import nn


def density_by_weight(model: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """The share of each weight's numbers that are not 0.

    Args:
        model: baked.
        names: qualified names of weights, as `bert.encoder.layer.0.attention.self.query.weight`.
    """
    weights = {name: model.get_parameter(name) for name in names}
    return {name: weight.count_nonzero().item() / weight.numel() for name, weight in weights.items()}
