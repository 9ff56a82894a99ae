"""Parametrized weights become plain ones."""

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from prunelle.compression.quantization.inputs import release_inputs


def bake(model: nn.Module) -> list[str]:
    """Ends every compression method of a model in one step, in place: each weight becomes what was computed with.

    What is left is the stock model, whose checkpoint stock `from_pretrained` loads. Its inputs are no longer rounded:
    the exported file does that. (Pruned layers still hand on what they are given; `remove_layers` takes them out.)

    Args:
        model: Carrying any number of parametrizations, or none.

    Returns:
        The qualified names of the weights that were parametrized.
    """
    names = []
    for name, module in list(model.named_modules()):
        release_inputs(module)
        if not is_parametrized(module):
            continue
        for tensor in list(module.parametrizations):
            remove_parametrizations(module, tensor, leave_parametrized=True)
            with torch.no_grad():
                getattr(module, tensor).add_(0.0)  # -0.0, of a negative weight times 0, becomes 0.0
            names.append(f"{name}.{tensor}")
    return names
