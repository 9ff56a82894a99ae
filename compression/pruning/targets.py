"""Which weights of a model are pruned."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelle.compression.layers import find_layers
from prunelle.errors import InputError

LINEAR = (nn.Linear, Conv1D)


def find_prunable(
    model: PreTrainedModel, patterns: Sequence[str] = (), excluded: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Finds the linear modules whose `weight` is to be pruned, GPT-2's `Conv1D` among them.

    Args:
        model: of any architecture, with whatever head.
        patterns: shell patterns of qualified names, as `*.attention.*` or `classifier`, anywhere in the model.
            Without any, all linear modules within the layers: embeddings, pooler and head are left out.
        excluded: shell patterns of those to leave out again.

    Returns:
        The modules by qualified name, in the model's order.

    Raises:
        InputError: A pattern matches no linear module, nothing is left, or a weight is shared with another module
            (as that of an LM head with the embeddings), which would not be pruned with it.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR)}
    for pattern in (*patterns, *excluded):
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise InputError(
                f"the pattern {pattern} matches none of the {len(linear)} linear modules of {type(model).__name__}, "
                f"such as {', '.join(list(linear)[:2])}"
            )
    chosen = patterns or [f"{find_layers(model).name}.*"]
    found = {
        name: module
        for name, module in linear.items()
        if any(fnmatchcase(name, pattern) for pattern in chosen)
        and not any(fnmatchcase(name, pattern) for pattern in excluded)
    }
    if not found:
        raise InputError(f"no linear module of {type(model).__name__} is left to prune")
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name and (name in found or other in found):
                raise InputError(f"{name} and {other} share a weight, which cannot be pruned in one of them alone")
    return found
