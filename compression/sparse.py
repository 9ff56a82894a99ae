"""Checkpoints of models with zeros in them, that do not store the zeros.

`model_sparse.safetensors` has, for each weight where that is shorter, which of its numbers are not zero, as bits, and
those numbers: at a density of 10 % an eighth of the space. A stock class finds no weights in the folder and says so.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

SPARSE_NAME = "model_sparse.safetensors"
BITS, VALUES = ".bits", ".values"

# Numbers of as many bytes, by which a zero is told from a negative one.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def store_sparse(folder: Path) -> None:
    """Rewrites the weights of a checkpoint folder without their zeros, bit for bit; the dense files are removed.

    Args:
        folder: with one or several `*.safetensors`, as `save_pretrained` writes them.
    """
    files = _dense_files(folder)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, "pt") as dense:
            for name in dense.keys():  # noqa: SIM118 (it is no dict)
                tensor = dense.get_tensor(name)
                packed = _packed(tensor)
                if _size(*packed) < _size(tensor):
                    shapes[name] = list(tensor.shape)
                    tensors |= {name + BITS: packed[0], name + VALUES: packed[1]}
                else:
                    tensors[name] = tensor
    unfinished = folder / f"{SPARSE_NAME}.unfinished"
    save_file(tensors, unfinished, {"format": "pt", "shapes": json.dumps(shapes)})
    for file in [*files, *folder.glob("*.safetensors.index.json")]:
        file.unlink()
    unfinished.rename(folder / SPARSE_NAME)


def read_sparse(name_or_path: str) -> dict[str, Tensor] | None:
    """The weights of a checkpoint that `store_sparse` wrote, dense; None of any other, one saved over it too.

    Args:
        name_or_path: a folder, or a model of the hub.
    """
    file = cached_file(name_or_path, SPARSE_NAME, **_QUIETLY)
    if file is None or _dense_files(Path(name_or_path)):
        return None
    with safe_open(file, "pt") as packed:
        shapes = json.loads(packed.metadata()["shapes"])
        stored = set(packed.keys())
        weights = {name: packed.get_tensor(name) for name in stored if not _is_part(name, shapes)}
        for name, shape in shapes.items():
            weights[name] = _unpacked(packed.get_tensor(name + BITS), packed.get_tensor(name + VALUES), shape)
    return weights


_QUIETLY: dict[str, Any] = dict.fromkeys(
    (
        "_raise_exceptions_for_gated_repo",
        "_raise_exceptions_for_missing_entries",
        "_raise_exceptions_for_connection_errors",
    ),
    False,
)


def _dense_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.name != SPARSE_NAME)


def _is_part(name: str, shapes: dict[str, list[int]]) -> bool:
    return any(name.endswith(end) and name.removesuffix(end) in shapes for end in (BITS, VALUES))


def _packed(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(ceil(numbers / 8),) uint8, a bit a number, the first the lowest; and the numbers whose bit is 1."""
    flat = tensor.flatten()
    kept = flat.view(_INTEGERS[flat.element_size()]) != 0  # -0.0 too
    return torch.from_numpy(np.packbits(kept.numpy(), bitorder="little")), flat[kept]


def _unpacked(bits: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    dense = values.new_zeros(shape)
    kept = np.unpackbits(bits.numpy(), count=dense.numel(), bitorder="little")
    dense.view(-1)[torch.from_numpy(kept.astype(bool))] = values
    return dense


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
