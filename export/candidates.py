"""The models of a comparison: what the command line calls them, and how each is loaded."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.compression import from_pretrained
from prunelle.errors import InputError, load_checkpoint_with
from prunelle.export.runner import OnnxRunner, Runner, TorchRunner
from prunelle.export.weights import Weights, onnx_weights, read_onnx, torch_weights
from prunelle.tasks.causal_lm import check_causal
from prunelle.tasks.pretrained_tokenizer import load_tokenizer

# torch.jit.trace and torch.ao.quantization.quantize_dynamic are deprecated, so TorchScript and PyTorch's int8 are not
# among them.
FORMATS = {
    "torch": "a checkpoint in PyTorch, float32",
    "torch-bf16": "the same in bfloat16",
    "torch-compile": "the same through torch.compile",
    "onnx": "an ONNX file, or those in a folder's onnx/, in onnxruntime",
}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Candidate:
    """One model: how it is run, and where it is.

    Attributes:
        name: what the report calls it.
        format: one of `FORMATS`.
        path: a checkpoint folder, a hub model, or an ONNX file.
    """

    name: str
    format: str
    path: str

    @property
    def home(self) -> str | None:
        """Where its configuration and its tokenizer are. An ONNX file's: beside it, or one folder up."""
        if self.format != "onnx":
            return self.path
        folder = Path(self.path).parent
        homes = [str(place) for place in (folder, folder / "..") if (place / "config.json").is_file()]
        return str(Path(homes[0]).resolve()) if homes else None

    def config(self) -> PreTrainedConfig | None:
        """Its configuration; None where an ONNX file has none."""
        return None if self.home is None else load_checkpoint_with(AutoConfig.from_pretrained, self.home)

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None where its folder has none."""
        if self.home is None:
            return None
        home = Path(self.home)
        if home.is_dir() and not any((home / name).is_file() for name in TOKENIZER_FILES):
            return None
        return load_tokenizer(self.home)

    def load(self, auto_class: Any) -> Runner:
        """The model, ready to run on the CPU.

        Args:
            auto_class: `AutoModelFor…` of the task, which a checkpoint is loaded by.

        Raises:
            InputError: It cannot be loaded, or a part of it would be random: a checkpoint without trained head. Or it
                sees the words that it would have to predict.
        """
        if self.format == "onnx":
            return OnnxRunner(self.path, self.name, parameters=0)
        dtype = torch.bfloat16 if self.format == "torch-bf16" else torch.float32
        model, loading = from_pretrained(self.path, auto_class, dtype=dtype, output_loading_info=True)
        missing = sorted(loading["missing_keys"])
        if missing:
            raise InputError(
                f"{self.path} holds no trained {auto_class.__name__.removeprefix('AutoModel')}: it lacks "
                f"{', '.join(missing[:2])}{' and more' if len(missing) > 2 else ''}"
            )
        check_causal(model, auto_class, self.path)
        return TorchRunner(model.eval(), self.name, format=self.format, compiled=self.format == "torch-compile")

    def weigh(self, runner: Runner) -> Weights:
        """The size on disk, and the numbers, of what `load` gave."""
        if isinstance(runner, TorchRunner):
            # The files of a checkpoint hold another precision than bfloat16, as a rule.
            folder = Path(self.path) if self.format != "torch-bf16" and Path(self.path).is_dir() else None
            return torch_weights(runner.model, folder)
        return onnx_weights(Path(self.path))


def find_candidates(reference: str, candidates: Sequence[str]) -> list[Candidate]:
    """All models that are meant, the reference first.

    Each is a checkpoint folder, a hub model, an ONNX file or a folder with `onnx/*.onnx`, or one of them as
    `FORMAT:PATH`. A candidate folder with both a checkpoint and ONNX files stands for all of them; as the
    reference it stands for its checkpoint.

    Raises:
        InputError: A file that is not there, an unknown format, a reference that could be several models, or
            no candidate but the reference itself.
    """
    first = _expand(reference)
    checkpoints = [pair for pair in first if pair[0] != "onnx"]
    if len(first) > 1 and not checkpoints:
        raise InputError(f"--reference {reference} could be any of {', '.join(path for _, path in first)}: give one")
    found = dict.fromkeys([(checkpoints or first)[0]])
    for candidate in candidates:
        found |= dict.fromkeys(_expand(candidate))
    if len(found) < 2:
        raise InputError(f"nothing to compare with {reference}: give other models with --candidates")
    return [Candidate(name, format, path) for name, (format, path) in zip(_names(list(found)), found, strict=True)]


def _expand(given: str) -> list[tuple[str, str]]:
    """A word of the command line as formats and paths."""
    prefix, colon, rest = given.partition(":")
    # A single letter before a colon is a drive.
    if colon and prefix not in FORMATS and len(prefix) > 1 and not Path(given).exists():
        raise InputError(f"{given}: no format {prefix!r}; there is {', '.join(FORMATS)}")
    format, path = (prefix, rest) if colon and prefix in FORMATS else (None, given)
    place = Path(path)
    if place.suffix == ".onnx":
        if format not in (None, "onnx"):
            raise InputError(f"{given}: an ONNX file cannot be run as {format}")
        if not place.is_file():
            raise InputError(f"no file {path}")
        return [_onnx(place.resolve())]
    if not place.is_dir():
        if place.exists():
            raise InputError(f"{path} is neither a folder nor an ONNX file")
        if format == "onnx":
            raise InputError(f"no folder {path}")
        return [(format or "torch", path)]
    place = place.resolve()
    files = [_onnx(file) for file in sorted(place.glob("onnx/*.onnx"))]
    if format == "onnx":
        if not files:
            raise InputError(f"{path} holds no onnx/*.onnx")
        return files
    if format is not None:
        return [(format, str(place))]
    has_weights = any(place.glob("*.safetensors")) or any(place.glob("pytorch_model*.bin"))
    if not has_weights and not files:
        raise InputError(f"{path} holds neither a checkpoint nor onnx/*.onnx")
    return [("torch", str(place))] * has_weights + files


def _onnx(file: Path) -> tuple[str, str]:
    read_onnx(file)  # for what it refuses, before anything is loaded
    return "onnx", str(file)


def _names(found: list[tuple[str, str]]) -> list[str]:
    """For each model the end of its path, as much of it as tells it from the others."""
    parts = [[part for part in Path(path).parts if format != "onnx" or part != "onnx"] for format, path in found]
    depths = [1] * len(found)
    while True:
        names = [
            "/".join(words[-depth:]) + ("" if format in ("torch", "onnx") else f" ({format})")
            for words, depth, (format, _) in zip(parts, depths, found, strict=True)
        ]
        counts = Counter(names)
        deeper = [
            min(depth + (counts[name] > 1), len(words)) for depth, name, words in zip(depths, names, parts, strict=True)
        ]
        if deeper == depths:
            return names
        depths = deeper
