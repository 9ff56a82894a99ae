"""What a model shows of its weights while it computes on examples."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression.hooks import hooked
from prunelle.errors import InputError


@contextmanager
def input_norms(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Gathers the norm over all tokens of each feature that linear modules read.

    Args:
        model: called with tensors by name; what its `attention_mask` leaves out does not count, nor in a decoder what
            the decoder's own does.
        modules: parts of it, by name.

    Yields:
        By name (inputs,) the l2 norms, filled in at the end.

    Raises:
        InputError: at the end: one of the modules has read nothing.
    """
    squares: dict[str, Any] = dict.fromkeys(modules, 0.0)
    batch: dict[str, Any] = {}

    def remember(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for name in ("attention_mask", "encoder_hidden_states", "encoder_attention_mask"):
            batch[name] = kwargs.get(name)

    def add(name: str, inputs: Tensor) -> None:
        reads_encoder = inputs is batch["encoder_hidden_states"]
        mask = batch["encoder_attention_mask" if reads_encoder else "attention_mask"]
        if mask is not None and mask.shape == inputs.shape[:-1]:
            inputs = inputs[mask.bool()]
        squares[name] += inputs.detach().flatten(0, -2).float().square().sum(0)

    readers = [model, model.get_decoder()] if model.config.is_encoder_decoder else [model]
    hooks = [reader.register_forward_pre_hook(remember, with_kwargs=True) for reader in readers]
    for name, module in modules.items():
        hooks.append(module.register_forward_pre_hook(lambda module, args, name=name: add(name, args[0])))
    norms: dict[str, Tensor] = {}
    with hooked(hooks):
        yield norms
    _check_reached(modules, {name for name, total in squares.items() if isinstance(total, Tensor)})
    norms |= {name: total.sqrt() for name, total in squares.items()}


@contextmanager
def gate_gradients(readers: Mapping[str, tuple[nn.Module, int]]) -> Iterator[dict[str, Tensor]]:
    """Gathers how much the loss of an example would change with a gate on each part of what linear modules read.

    It is |sum of x dL/dx| over the part and the example's tokens, added up over examples. The loss has to be a mean
    over the batch.

    Args:
        readers: by name a module, and into how many parts its inputs are cut.

    Yields:
        By name (parts,) the sums.

    Raises:
        InputError: at the end: of one of the modules there is no gradient.
    """
    sums: dict[str, Any] = {}

    def listen(name: str, parts: int, inputs: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            examples = inputs.shape[0] if inputs.dim() > 2 else 1
            change = (inputs.detach() * gradient).float().reshape(examples, -1, parts, inputs.shape[-1] // parts)
            sums[name] = sums.get(name, 0.0) + examples * change.sum((1, 3)).abs().sum(0)

        inputs.register_hook(add)

    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name, parts=parts: listen(name, parts, args[0]))
        for name, (module, parts) in readers.items()
    ]
    with hooked(hooks):
        yield sums
    _check_reached(readers, sums)


def _check_reached(names: Iterable[str], found: Collection[str]) -> None:
    if missed := [name for name in names if name not in found]:
        raise InputError(f"no example reaches {missed[0]}, and nothing can be found out about it: exclude it")
