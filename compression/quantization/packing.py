"""Ternary and binary weights in the space that they need: 2 bits each, and 1."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression.quantization.plan import QuantizationPlan


def save_packed(model: PreTrainedModel, plan: QuantizationPlan, file: Path) -> None:
    """Writes a model's tensors, the weights of the plan's linear modules packed.

    Args:
        model: baked; trained with the plan, whose scheme is `ternary` or `binary`.
        plan: which weights to pack.
        file: of safetensors.
    """
    bits = 2 if plan.scheme == "ternary" else 1
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    shapes = {}
    for name in plan.linear:
        weight = tensors.pop(f"{name}.weight")
        input_axis = 1 if isinstance(model.get_submodule(name), nn.Linear) else 0
        scale = weight.abs().amax(input_axis, keepdim=True)
        codes = weight.sign().long() + 1 if bits == 2 else (weight > 0).long()
        tensors |= {f"{name}.weight.codes": pack(codes, bits), f"{name}.weight.scale": scale}
        shapes[f"{name}.weight"] = list(weight.shape)
    save_file(tensors, file, {"bits": str(bits), "packed": json.dumps(shapes)})


def load_packed(file: Path) -> dict[str, Tensor]:
    """The state dict of the model that `save_packed` was given, bit for bit."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    bits = int(metadata["bits"])
    for name, shape in json.loads(metadata["packed"]).items():
        codes, scale = tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scale")
        signs = unpack(codes, bits, torch.Size(shape).numel()).view(shape).to(scale.dtype)
        tensors[name] = (signs - 1 if bits == 2 else 2 * signs - 1) * scale
    return tensors


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2 ** bits, several a byte, the first in the lowest bits.

    Args:
        codes: int64, of any shape.
        bits: 1, 2 or 4.

    Returns:
        uint8, flat.
    """
    each = 8 // bits
    flat = torch.nn.functional.pad(codes.flatten(), (0, -codes.numel() % each)).view(-1, each)
    return (flat << (bits * torch.arange(each, device=codes.device))).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first so many of the numbers that `pack` was given: (count,) int64."""
    shifts = bits * torch.arange(8 // bits, device=packed.device)
    return ((packed.long()[:, None] >> shifts) & (2**bits - 1)).flatten()[:count]
