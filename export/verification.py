"""Does an ONNX file compute what the PyTorch model computes?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunelle.export.calibration import activation_ranges
from prunelle.export.divergence import parting, tolerance
from prunelle.export.inference import ExportError, deployed, maximum_length
from prunelle.export.runner import Batch, Logits, OnnxRunner, Runner, TorchRunner, first_line

HALF_END = float(np.finfo(np.float16).max)
FLOAT_END = float(np.finfo(np.float32).max)


def verify_onnx(model: nn.Module, file: Path) -> None:
    """Compares logits over batches of 1 to 5 rows, lengths of 1 to the maximum, padding on either side.

    Only attended positions are compared: what stands at a padded one is never read, and the row of a
    causal mask that attends to nothing is undefined.

    Raises:
        ExportError: at the first difference above `tolerance`, or at logits that are not finite. It names the node at
            which the two part. Or one of the two does not run at a shape.
    """
    onnx_runner = OnnxRunner(file, "the ONNX file", parameters=0)
    torch_runner = TorchRunner(model, type(model).__name__)
    with deployed(model):
        for batch, attended, shape in _cases(model):
            batch = {name: batch[name] for name in onnx_runner.input_names}
            reference, candidate = _run(torch_runner, batch, shape), _run(onnx_runner, batch, shape)
            if reference.ndim == 3:
                reference, candidate = reference[attended], candidate[attended]
            difference = float(np.abs(reference - candidate).max(initial=0.0))
            if not difference <= tolerance(reference):  # so written that NaN fails
                raise ExportError(
                    f"the ONNX file's logits differ from PyTorch's by {difference:.1e} (allowed: "
                    f"{tolerance(reference):.1e}) at {shape}; {parting(model, file, batch, attended)}"
                )


def verify_runs(model: nn.Module, file: Path) -> None:
    """Runs a file of lower precision at the shapes of `verify_onnx`.

    Rounding to few bits may change logits by any amount, but never their shape, and never to infinity.

    Raises:
        InputError: onnxruntime cannot load the file.
        ExportError: it does not run at a shape, or gives logits that are none.
    """
    runner = OnnxRunner(file, file.name, parameters=0)
    for batch, attended, shape in _cases(model):
        logits = _run(runner, batch, shape)
        if logits.shape[:-1] not in (attended.shape, attended.shape[:1]):
            raise ExportError(f"{file.name} gives logits of shape {logits.shape} at {shape}")
        if not np.isfinite(logits if logits.ndim == 2 else logits[attended]).all():
            raise ExportError(f"{file.name} gives logits that are not finite at {shape}")


def verify_half_range(model: nn.Module, fp32_file: Path) -> None:
    """Sees that float16 can hold whatever the model computes at the shapes of `verify_onnx`.

    onnxruntime computes a float16 file in float32 on a CPU, where nothing overflows: so this looks at the values
    within the float32 file. Infinity, and float32's end, are what attention masks are made of; they are kept.

    Raises:
        ExportError: a value is beyond float16's end.
    """
    proto = onnx.load(fp32_file)
    tensors = [*proto.graph.value_info, *proto.graph.output]
    names = [each.name for each in tensors if each.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    ranges = activation_ranges(proto, names, [batch for batch, _, _ in _cases(model)], "minmax")
    for name, ends in zip(names, ranges, strict=True):
        largest = max(abs(end) for end in ends)
        if HALF_END < largest < 0.99 * FLOAT_END:
            raise ExportError(
                f"float16 ends at {HALF_END:,.0f}, and {name} reaches {largest:,.0f}: export without fp16"
            )


def _run(runner: Runner, batch: Batch, shape: str) -> Logits:
    try:
        return runner(batch)
    except Exception as error:  # whatever a model's code raises, and onnxruntime
        raise ExportError(f"{runner.name} does not run at {shape}: {first_line(error)}") from error


def _cases(model: nn.Module) -> Iterator[tuple[dict[str, Tensor], NDArray[np.bool_], str]]:
    """Batches of all shapes that matter, where words are in them, and what they are in words."""
    longest = min(maximum_length(model), 512)
    for rows, length, padding in (
        (1, 1, "no"),
        (1, longest, "no"),
        (2, min(7, longest), "right"),
        (3, min(17, longest), "left"),
        (5, min(33, longest), "right"),
    ):
        batch, attended = _random_batch(model, rows, length, padding)
        yield batch, attended, f"{rows} x {length} tokens with {padding} padding"


def _random_batch(
    model: nn.Module, rows: int, length: int, padding: str
) -> tuple[dict[str, Tensor], NDArray[np.bool_]]:
    """Random words, each row after the first with one token more of padding; and where words are."""
    generator = torch.Generator().manual_seed(0)
    config = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None) or 0
    vocabulary = getattr(config, "vocab_size", None) or 2
    words = torch.randint(vocabulary - 1, (rows, length), generator=generator)
    words += words >= pad  # any word but padding, at which RoBERTa stops counting positions
    mask = torch.ones_like(words)
    for row in range(rows):
        padded = min(row, length - 1)
        if padding == "right" and padded:
            mask[row, -padded:] = 0
        if padding == "left" and padded:
            mask[row, :padded] = 0
    batch = {
        "input_ids": words.where(mask == 1, torch.tensor(pad)),
        "attention_mask": mask,
        "token_type_ids": (torch.arange(length) >= length // 2).long().expand(rows, length),
    }
    return batch, mask.numpy() == 1
