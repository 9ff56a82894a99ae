"""One face for a PyTorch model and an ONNX file: tensors in, logits out."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunelle.errors import InputError
from prunelle.export.inference import ANSWER_OUTPUTS, INPUT_NAMES, OUTPUTS, LogitsOnly, model_input_names

Batch = Mapping[str, Any]  # names to (batch, length) tensors of PyTorch or numpy
Logits = NDArray[np.float32]

_KNOWN_INPUTS = [(name, "tensor(int64)") for name in INPUT_NAMES]


class Runner(ABC):
    """A model that can be asked for logits on the CPU, whatever it is written in.

    Attributes:
        name: what the report calls it.
        format: `torch`, `onnx`, `onnx-int8`, …
        size_bytes: what its weights file takes on disk.
        parameters: how many numbers were learned, tied ones counted once. Quantizing does not change it.
        input_names: the tensors that a batch must hold.
    """

    name: str
    format: str
    size_bytes: int
    parameters: int
    input_names: tuple[str, ...]

    @abstractmethod
    def __call__(self, batch: Batch) -> Logits:
        """batch: (batch, length) int64 tensors by name. Returns (batch, …, classes) float32 logits.

        Where an answer's start and end are asked: (batch, length, 2), of each token as the one and as the other.

        Raises InputError when the batch lacks a tensor that the model needs.
        """

    def time_calls(self, batch: Batch, calls: int) -> list[float]:
        """How long each of so many calls takes, in milliseconds.

        One more comes first and is not counted: it warms the caches, and lets the threads of the model before
        come to rest.
        """
        self(batch)
        taken = []
        for _ in range(calls):
            start = time.perf_counter()
            self(batch)
            taken.append(1000 * (time.perf_counter() - start))
        return taken

    def _check(self, batch: Batch) -> None:
        missing = [name for name in self.input_names if name not in batch]
        if missing:
            raise InputError(f"{self.name} needs {', '.join(missing)}, the batch has {', '.join(batch)}")


class TorchRunner(Runner):
    """A PyTorch model, which must be as `inference.deployed` makes it while it is run.

    `folder` is the checkpoint whose safetensors files are counted; without one, the parameters' bytes.
    `compiled` runs it through `torch.compile`: the first calls take long.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        folder: str | Path | None = None,
        format: str = "torch",
        compiled: bool = False,
    ) -> None:
        self.name = name
        self.format = format
        self.model = model
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        files = list(Path(folder).glob("*.safetensors")) if folder is not None else []
        self.size_bytes = sum(file.stat().st_size for file in files) or _bytes_of_weights(model)
        self.input_names = ("input_ids",)
        self._usable = model_input_names(model)
        self._logits: Callable[..., tuple[Tensor, ...]] = LogitsOnly(model)
        if compiled:
            self._logits = torch.compile(self._logits)

    def __call__(self, batch: Batch) -> Logits:
        self._check(batch)
        inputs = {name: torch.as_tensor(batch[name]) for name in self._usable if name in batch}
        with torch.inference_mode():
            return _joined([tensor.float().numpy() for tensor in self._logits(**inputs)])


class OnnxRunner(Runner):
    """An ONNX file in onnxruntime, on as many threads as PyTorch uses.

    Raises InputError when onnxruntime cannot load the file, or when the file is no text model: it takes other
    tensors than a tokenizer gives, or gives no `logits`.
    """

    def __init__(self, file: str | Path, name: str, *, parameters: int, format: str = "onnx") -> None:
        self.name = name
        self.format = format
        self.parameters = parameters
        file = Path(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that spin after a run, waiting for the next one, would slow the model measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(f"onnxruntime cannot load {file}: {first_line(error)}") from error
        inputs = {tensor.name: tensor.type for tensor in self._session.get_inputs()}
        unknown = [f"{name} ({kind})" for name, kind in inputs.items() if (name, kind) not in _KNOWN_INPUTS]
        if unknown:
            raise InputError(
                f"{file} takes {', '.join(unknown)}, but a text gives only {', '.join(INPUT_NAMES)} (int64)"
            )
        outputs = [tensor.name for tensor in self._session.get_outputs()]
        known = [names for names in (OUTPUTS, ANSWER_OUTPUTS) if set(names) <= set(outputs)]
        if not known:
            raise InputError(f"{file} gives {', '.join(outputs)} and no logits")
        self._outputs = known[0]
        self.size_bytes = file.stat().st_size
        self.input_names = tuple(inputs)

    def __call__(self, batch: Batch) -> Logits:
        # Blocks of plain text have no token types: they are 0 then, as PyTorch's models take them to be.
        batch = {"token_type_ids": np.zeros(np.shape(batch.get("input_ids", ())), np.int64), **batch}
        self._check(batch)
        outputs = self._session.run(self._outputs, {name: np.asarray(batch[name]) for name in self.input_names})
        # A file in half precision gives half precision.
        return _joined([logits.astype(np.float32, copy=False) for logits in outputs])


def _joined(outputs: list[Logits]) -> Logits:
    return outputs[0] if len(outputs) == 1 else np.stack(outputs, axis=-1)


def _bytes_of_weights(model: nn.Module) -> int:
    tensors: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for tensor in model.state_dict().values():
        tensors[tensor.data_ptr(), tuple(tensor.shape)] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def first_line(error: Exception) -> str:
    """What a message of one line can say of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
