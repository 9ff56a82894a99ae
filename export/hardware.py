"""The machine that a measurement was made on."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

# Instructions that multiply 8-bit integers and add up in 32 bits, as /proc/cpuinfo spells them:
# x86-64, then 64-bit ARM (asimddp is the dot product that chips since 2018 have).
INT8_INSTRUCTIONS = (
    "avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8",
    "asimddp", "i8mm", "svei8mm", "smei8i32",
)  # fmt: skip
# The same for bfloat16, without which it is emulated.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "svebf16", "smeb16f32")


def hardware() -> dict[str, Any]:
    """cpu (its name), cores, threads that the models ran on, and the int8 and bfloat16 instructions found.

    The instructions are None where the operating system does not tell.
    """
    name, features = _linux() if platform.system() == "Linux" else _other()

    def among(instructions: tuple[str, ...]) -> list[str] | None:
        return None if features is None else [each for each in instructions if each in features]

    return {
        "cpu": name,
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "int8_instructions": among(INT8_INSTRUCTIONS),
        "bf16_instructions": among(BF16_INSTRUCTIONS),
    }


def _linux() -> tuple[str, set[str] | None]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), None
    fields = {}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    features = fields.get("flags", fields.get("Features"))
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, None if features is None else set(features.split())


def _other() -> tuple[str, set[str] | None]:
    name = platform.processor() or platform.machine()
    if platform.system() != "Darwin":
        return name, None
    name = _sysctl("machdep.cpu.brand_string") or name
    if platform.machine() != "arm64":
        return name, None
    features = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}
    return name, {ours for theirs, ours in features.items() if _sysctl(f"hw.optional.arm.{theirs}") == "1"}


def _sysctl(key: str) -> str:
    done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    return done.stdout.strip()
