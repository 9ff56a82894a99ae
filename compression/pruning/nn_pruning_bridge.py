"""nn_pruning understood: its checkpoints are read. Only here is known how it names things, and what of it is broken.

It need not be installed. What of version 0.1.2 no longer works, on Python 3.11 or later with transformers 5:

- `modules.masked_nn`, and so `patch_coordinator`, is not imported: its dataclasses have defaults that cannot be
  hashed; see `import_patch_coordinator`. `sparse_trainer` is not either: transformers has no `AdamW` any more.
- Models are not compiled: transformers has no `prune_heads` any more.
- Method `magnitude` asks for scores that it does not have, submethod `joint` for ones that its own assertion refuses,
  `1d` on attention for ones of a kind that it does not know; the ampere method `topK` is not made.
- `mask_init` and `mask_scale` are ignored: scores begin at 0.
- Submethod `1d` multiplies scores of rows by scores of columns, which at 0 have no gradient: they never move.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prunelle.compression.pruning.masks import HIGH, LOW
from prunelle.compression.pruning.selection import keep_highest, keep_highest_in_rows
from prunelle.compression.shapes import layer_shapes
from prunelle.errors import InputError

ARGUMENTS_NAME = "sparse_args.json"
RUN = 4  # Of the weights in its ampere patterns, of which two stay.

# What its masked modules call what they are masked by: their scores, one or two of them, and those of patterns.
_MASKS = (".mask_module.", ".ampere_module.")
_SCORES, _PATTERN = ".mask_module.context_modules.{}.mask_scores", ".ampere_module.context_module.mask_scores"
_PATTERNS = ".ampere_module.ampere_pattern"


def import_patch_coordinator() -> Any:
    """nn_pruning's `patch_coordinator`, which Python 3.11 and later refuse to import as it is."""
    with mock.patch("dataclasses.dataclass", functools.partial(dataclasses.dataclass, unsafe_hash=True)):
        from nn_pruning import patch_coordinator
    return patch_coordinator


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


def read_masked(folder: Path, config: PreTrainedConfig) -> dict[str, Tensor] | None:
    """The weights of a checkpoint of one of nn_pruning's runs, masked as it masks them in evaluation.

    Args:
        folder: with the run's `sparse_args.json`.
        config: of the model; where its GeLUs became ReLUs it says so now.

    Returns:
        What a stock model of this configuration has; None of any other folder, that of a compiled model too.

    Raises:
        InputError: The folder does not say how its scores become masks, or the run did what cannot be understood.
    """
    weights = _masked_weights(folder)
    if weights is None:
        return None
    if not (folder / ARGUMENTS_NAME).is_file():
        raise InputError(f"it holds scores of nn_pruning, and no {ARGUMENTS_NAME} that says how they become masks")
    # Runs of older versions do not say whether biases are masked, and then they are not.
    arguments = _Arguments.read(folder / ARGUMENTS_NAME, bias_mask=False)
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
    return plain


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """Its `SparseTrainingArguments`, and their defaults."""

    mask_scores_learning_rate: float = 1e-2
    dense_pruning_method: str = "topK"
    attention_pruning_method: str = "topK"
    ampere_pruning_method: str = "disabled"
    attention_output_with_dense: bool = True
    bias_mask: bool = True
    mask_init: str = "constant"
    mask_scale: float = 0.0
    dense_block_rows: int = 1
    dense_block_cols: int = 1
    attention_block_rows: int = 1
    attention_block_cols: int = 1
    initial_threshold: float = 1.0
    final_threshold: float = 0.5
    initial_warmup: float = 1.0
    final_warmup: float = 2.0
    initial_ampere_temperature: float = 0.0
    final_ampere_temperature: float = 20.0
    regularization: str | None = "disabled"
    regularization_final_lambda: float = 0.0
    attention_lambda: float = 1.0
    dense_lambda: float = 1.0
    distil_teacher_name_or_path: str | None = None
    distil_alpha_ce: float = 0.5
    distil_alpha_teacher: float = 0.5
    distil_temperature: float = 2.0
    final_finetune: bool = False
    layer_norm_patch: bool = False
    layer_norm_patch_steps: int = 50000
    layer_norm_patch_start_delta: float = 0.99
    gelu_patch: bool = False
    gelu_patch_steps: int = 50000
    linear_min_parameters: float = 0.005
    rewind_model_name_or_path: str | None = None

    @staticmethod
    def read(file: Path, **defaults: Any) -> "_Arguments":
        """What a file says, over the defaults.

        Raises:
            InputError: There is no such file, it is no JSON object, or says what nn_pruning knows nothing about.
        """
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not JSON that can be read: {error}") from error
        if not isinstance(said, dict):
            raise InputError(f"{file} must be an object: nn_pruning's SparseTrainingArguments")
        known = {field.name for field in dataclasses.fields(_Arguments)}
        if unknown := sorted(said.keys() - known):
            raise InputError(f"{file} says {unknown[0]}, which is none of nn_pruning's SparseTrainingArguments")
        return _Arguments(**(defaults | said))

    def way_of(self, module: str) -> "_Way":
        """How a module is pruned, by its name in a BERT."""
        is_output = module.endswith("attention.output.dense")
        if module.endswith(("query", "key", "value")) or (is_output and not self.attention_output_with_dense):
            method, blocks = self.attention_pruning_method, (self.attention_block_rows, self.attention_block_cols)
            blocks = blocks[::-1] if is_output else blocks
        else:
            method, blocks = self.dense_pruning_method, (self.dense_block_rows, self.dense_block_cols)
        method, _, submethod = method.partition(":")
        return _Way(method, submethod or "default", blocks)


@dataclasses.dataclass(frozen=True)
class _Way:
    """How scores become a mask: by a method, alone or as rows by columns, for blocks of so many rows and columns."""

    method: str
    submethod: str
    blocks: tuple[int, int]


def _masked_weights(folder: Path) -> dict[str, Tensor] | None:
    """All that a checkpoint of one file holds; None where it has no scores, or there is no such file."""
    if (file := folder / "model.safetensors").is_file():
        with safe_open(file, "pt") as opened:
            is_masked = _is_masked(opened.keys())
        return load_file(file) if is_masked else None
    if (file := folder / "pytorch_model.bin").is_file():
        weights = torch.load(file, "cpu", weights_only=True)
        return weights if _is_masked(weights) else None
    return None


def _is_masked(names: Iterable[str]) -> bool:
    return any(part in name for name in names for part in _MASKS)


def _mask(name: str, weights: Mapping[str, Tensor], arguments: _Arguments) -> Tensor:
    """Of a masked module in evaluation: of its weight's shape, what that is multiplied by."""
    way, shape = arguments.way_of(name), weights[f"{name}.weight"].shape
    mask = torch.ones(shape)
    if way.method != "disabled":
        scores = _scores(name, weights, way, shape)
        blocks = _kept(scores, way.method, arguments.final_threshold, arguments.linear_min_parameters)
        mask = blocks.float().repeat_interleave(way.blocks[0], 0).repeat_interleave(way.blocks[1], 1)
    if (pattern := weights.get(name + _PATTERN)) is None:
        return mask
    if arguments.ampere_pruning_method == "annealing":  # a score for each pattern of each run of an input's weights
        chosen = weights[name + _PATTERNS][pattern.argmax(-1)]
        return mask * chosen.flatten(1).T
    return mask * keep_highest_in_rows(pattern.unflatten(1, (-1, RUN)), RUN // 2, 2).flatten(1)


def _scores(name: str, weights: Mapping[str, Tensor], way: _Way, shape: torch.Size) -> Tensor:
    """A score for each block of a module."""
    if not way.submethod.startswith("1d"):
        return weights[name + _SCORES.format(0)]
    sides = []
    for number in (0, 1):  # one of them is missing where that side is not pruned
        ones = torch.ones(shape[number] // way.blocks[number])
        sides.append(weights.get(name + _SCORES.format(number), ones))
    return sides[0].outer(sides[1])


def _kept(scores: Tensor, method: str, threshold: float, least: float) -> Tensor:
    """What of (…) scores stays: 1 or 0, of `l0` anything between."""
    if method == "topK":
        return keep_highest(scores, int(threshold * scores.numel()))
    if method == "l0":
        return (scores.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
    if method not in ("threshold", "sigmoied_threshold"):
        raise InputError(f"nn_pruning has no method {method} that runs")
    kept = (scores.sigmoid() if method == "sigmoied_threshold" else scores) > threshold
    fewest = int(least * scores.numel()) + 1 if least else 0
    if kept.sum() >= fewest:
        return kept
    return scores > scores.flatten().kthvalue(max(scores.numel() - fewest, 1)).values
