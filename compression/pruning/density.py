"""What is left of a model's weights."""

from collections.abc import Iterable

from torch import nn

from prunelle.compression.targets import LINEAR


def density_by_weight(model: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """The share of each weight's numbers that are not 0.

    Args:
        model: baked.
        names: qualified names of parameters, as `bert.encoder.layer.0.attention.self.query.weight`. Those that are no
            weight of a linear module are passed over.
    """
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names if name.endswith(".weight")}
    weights = {name: module.weight for name, module in modules.items() if isinstance(module, LINEAR)}
    return {name: weight.count_nonzero().item() / weight.numel() for name, weight in weights.items()}
