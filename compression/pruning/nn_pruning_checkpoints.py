"""Checkpoints that nn_pruning wrote, read as the models that they are in evaluation."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from prunelle.compression.norms import LAYER_NORM, NO_NORM
from prunelle.compression.pruning.nn_pruning_bridge import RUN, SparseArguments, Way, kept
from prunelle.compression.pruning.selection import keep_highest_in_rows
from prunelle.compression.shapes import layer_shapes
from prunelle.errors import InputError

ARGUMENTS_NAME, WEIGHTS = "sparse_args.json", ("model.safetensors", "pytorch_model.bin")

# What its masked modules call what they are masked by: their scores, one or two of them, and those of patterns.
_MASKS = (".mask_module.", ".ampere_module.")
_SCORES, _PATTERN = ".mask_module.context_modules.{}.mask_scores", ".ampere_module.context_module.mask_scores"
_PATTERNS = ".ampere_module.ampere_pattern"
_SUMS = ".accumulator"  # Of the means and variances that a norm on its way to a NoNorm saw, and of their number.


def say_pruned_heads(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Says in a configuration the sizes of layers that transformers before 5, and so nn_pruning, took heads out of."""
    pruned = vars(config).pop("pruned_heads", None)
    if not pruned or getattr(config, "layer_shapes", None) is not None:
        return
    with torch.device("meta"):
        shapes = layer_shapes(model_class(config))
    for layer, heads in pruned.items():
        shape = shapes[int(layer)]
        shape["heads"] = [head for head in shape["heads"] if head not in heads]
    config.layer_shapes = shapes


def read_nn_pruning(name_or_path: str, config: PreTrainedConfig) -> dict[str, Tensor] | None:
    """The weights of a checkpoint that nn_pruning wrote, where they are not as a model here takes them.

    Those of a run are masked as it masks them in evaluation; those of NoNorms have another shape.

    Args:
        name_or_path: A folder, or a model of the hub, which no run is.
        config: Of the model; it says now where GeLUs became ReLUs, and LayerNorms NoNorms.

    Returns:
        What a model of this configuration has; None of any other checkpoint.

    Raises:
        InputError: The folder does not say how its scores become masks, or the run did what cannot be understood.
    """
    if (masked := _masked_weights(Path(name_or_path))) is not None:
        return _baked(Path(name_or_path), masked, config)
    if vars(config).pop("layer_norm_type", None) != "no_norm":
        return None
    setattr(config, LAYER_NORM, NO_NORM)
    found = (cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False) for file in WEIGHTS)
    file = next(filter(None, found), None)
    if file is None:
        raise InputError(f"its NoNorms are read from one file, {' or '.join(WEIGHTS)}, and it has none")
    weights = _load(Path(file))
    norms = {name: tensor[None] for name, tensor in weights.items() if name.endswith("LayerNorm.weight")}
    return weights | norms


def _baked(folder: Path, weights: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """What a run's weights and scores are in evaluation."""
    if not (folder / ARGUMENTS_NAME).is_file():
        raise InputError(f"it holds scores of nn_pruning, and no {ARGUMENTS_NAME} that says how they become masks")
    # Runs of older versions do not say whether biases are masked, and then they are not.
    arguments = SparseArguments.read(folder / ARGUMENTS_NAME, bias_mask=False)
    if arguments.rewind_model_name_or_path is not None:
        raise InputError(f"its run kept the heads of {arguments.rewind_model_name_or_path}, whatever their scores")
    if arguments.gelu_patch:
        config.hidden_act = "relu"
    plain = {name: tensor for name, tensor in weights.items() if not any(part in name for part in _MASKS)}
    for name in sorted({name.partition(part)[0] for name in weights for part in _MASKS if part in name}):
        mask = _mask(name, weights, arguments)
        plain[f"{name}.weight"] = mask * plain[f"{name}.weight"]
        if arguments.bias_mask:
            plain[f"{name}.bias"] = (mask != 0).any(1) * plain[f"{name}.bias"]
    if arguments.layer_norm_patch:
        setattr(config, LAYER_NORM, NO_NORM)
        for name in [name.removesuffix(_SUMS) for name in weights if name.endswith(_SUMS)]:
            mean, variance, count = plain.pop(name + _SUMS)
            factor = plain[f"{name}.weight"] * (variance / count + config.layer_norm_eps).rsqrt()
            plain[f"{name}.bias"] = plain[f"{name}.bias"] - mean / count * factor
            plain[f"{name}.weight"] = factor[None]
    return plain


def _masked_weights(folder: Path) -> dict[str, Tensor] | None:
    """All that a checkpoint of one file holds; None where it has no scores, or there is no such file."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        return None
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            if not _is_masked(opened.keys()):
                return None
    weights = _load(file)
    return weights if _is_masked(weights) else None


def _load(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)


def _is_masked(names: Iterable[str]) -> bool:
    return any(part in name for name in names for part in _MASKS)


def _mask(name: str, weights: Mapping[str, Tensor], arguments: SparseArguments) -> Tensor:
    """Of a masked module in evaluation: of its weight's shape, what that is multiplied by."""
    way, shape = arguments.way_of(name), weights[f"{name}.weight"].shape
    mask = torch.ones(shape)
    if way.method != "disabled":
        scores = _scores(name, weights, way, shape)
        if way.method == "topK":  # by the order of its own sorting, in which equal scores are all of a dimension's
            order = scores.flatten().sort(descending=True).indices
            blocks = torch.zeros_like(scores)
            blocks.view(-1)[order[: int(arguments.final_threshold * scores.numel())]] = 1
        else:
            blocks = kept(scores, way.method, arguments.final_threshold, arguments.linear_min_parameters)
        mask = blocks.float().repeat_interleave(way.blocks[0], 0).repeat_interleave(way.blocks[1], 1)
    if (pattern := weights.get(name + _PATTERN)) is None:
        return mask
    if arguments.ampere_pruning_method == "annealing":  # a score for each pattern of each run of an input's weights
        chosen = weights[name + _PATTERNS][pattern.argmax(-1)]
        return mask * chosen.flatten(1).T
    return mask * keep_highest_in_rows(pattern.unflatten(1, (-1, RUN)), RUN // 2, 2).flatten(1)


def _scores(name: str, weights: Mapping[str, Tensor], way: Way, shape: torch.Size) -> Tensor:
    """A score for each block of a module."""
    if not way.submethod.startswith("1d"):
        return weights[name + _SCORES.format(0)]
    sides = []
    for number in (0, 1):  # one of them is missing where that side is not pruned
        ones = torch.ones(shape[number] // way.blocks[number])
        sides.append(weights.get(name + _SCORES.format(number), ones))
    return sides[0].outer(sides[1])
