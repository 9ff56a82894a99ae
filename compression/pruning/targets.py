"""Which weights of a model are pruned."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from prunelle.compression.layers import find_stacks
from prunelle.compression.targets import LINEAR, match_modules, shared_weights
from prunelle.errors import InputError


def find_prunable(
    model: PreTrainedModel, patterns: Sequence[str] = (), excluded: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Finds the linear modules whose `weight` is to be pruned, GPT-2's `Conv1D` among them.

    Args:
        model: of any architecture, with whatever head.
        patterns: shell patterns of qualified names, as `*.attention.*` or `classifier`, anywhere in the model.
            Without any, all linear modules within the layers, of encoder and decoder where it has both: embeddings,
            pooler and head are left out.
        excluded: shell patterns of those to leave out again.

    Returns:
        The modules by qualified name, in the model's order.

    Raises:
        InputError: A pattern matches no linear module, nothing is left, or a weight is shared with another module
            (as that of an LM head with the embeddings), which would not be pruned with it; or there are no patterns
            and the layers are not found.
    """
    found = match_modules(model, LINEAR, patterns or _within_layers(model), excluded)
    if not found:
        raise InputError(f"no linear module of {type(model).__name__} is left to prune")
    shared = shared_weights(model)
    for name in found:
        if name in shared:
            raise InputError(f"{name} and {shared[name]} share a weight, which cannot be pruned in one of them alone")
    return found


def _within_layers(model: PreTrainedModel) -> list[str]:
    try:
        return [f"{stack.name}.*" for stack in find_stacks(model)]
    except InputError as error:
        raise InputError(f"{error}; or name the modules to prune, as --pruned_modules '*.attention.*'") from error
