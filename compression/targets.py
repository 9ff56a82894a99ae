"""Which modules of a model a pattern means."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelle.errors import InputError

LINEAR = (nn.Linear, Conv1D)


def match_modules(
    model: PreTrainedModel,
    kinds: tuple[type[nn.Module], ...],
    patterns: Sequence[str] = ("*",),
    excluded: Sequence[str] = (),
) -> dict[str, nn.Module]:
    """Finds modules of some kinds by shell patterns of their qualified names, such as `*.attention.*`.

    Args:
        model: of any architecture, with whatever head.
        kinds: classes of modules.
        patterns: of those that are meant.
        excluded: of those to leave out again.

    Returns:
        The modules by qualified name, in the model's order.

    Raises:
        InputError: A pattern matches no module of these kinds.
    """
    known = {name: module for name, module in model.named_modules() if name and isinstance(module, kinds)}
    for pattern in (*patterns, *excluded):
        if known and not any(fnmatchcase(name, pattern) for name in known):
            raise InputError(
                f"the pattern {pattern} matches none of the {len(known)} modules of {type(model).__name__} that it is "
                f"for, such as {', '.join(list(known)[:2])}"
            )
    return {
        name: module
        for name, module in known.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatchcase(name, pattern) for pattern in excluded)
    }


def shared_weights(model: PreTrainedModel) -> dict[str, str]:
    """Modules that share a parameter with another, and that other, by qualified name."""
    owners: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name:
                shared |= {name: other, other: name}
    return shared
