"""What is left of a model's weights."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from prunelle.compression.bake import bake
from prunelle.compression.pruning.layers import kept_layers
from prunelle.compression.pruning.masks import Mask
from prunelle.compression.targets import LINEAR


def bake_masks(model: nn.Module) -> dict[str, Any]:
    """Bakes a model, whatever it carries, and says what its masks have left.

    Returns:
        `density`, of each masked weight by its qualified name, and `kept_layers`, where some were pruned; nothing of a
        model without masks.
    """
    masked = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if is_parametrized(module, "weight") and any(isinstance(each, Mask) for each in module.parametrizations.weight)
    ]
    bake(model)
    return {"density": density_by_weight(model, masked), "kept_layers": kept_layers(model)} if masked else {}


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
