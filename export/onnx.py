"""A PyTorch model to an ONNX file that computes the same."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from prunelle.export.files import published_when_done
from prunelle.export.inference import ExportError, LogitsOnly, deployed, model_input_names, output_names
from prunelle.export.origin import remove_stacks
from prunelle.export.rewriting import add_by_sum, merge_heads
from prunelle.export.verification import verify_onnx

# From this opset on attention is one standard operator. Below it becomes a chain of Where, IsNaN, Softmax
# and Transpose that onnxruntime does not fuse: slower than eager PyTorch at a batch.
OPSET_VERSION = 23


def export_onnx(
    model: nn.Module,
    output_file: str | Path,
    *,
    input_names: Sequence[str] | None = None,
    opset_version: int = OPSET_VERSION,
) -> Path:
    """Writes the model as one float32 ONNX file, checked against PyTorch, and returns its path.

    The file's inputs are those of `input_names`, (batch_size, sequence_length) int64, both free, a batch
    of one and a length of one included. Its one output is `logits`: (batch_size, classes) of a sequence
    classifier, (batch_size, sequence_length, vocabulary) of a language model (without a cache); of a question
    answerer there are two, `start_logits` and `end_logits`, (batch_size, sequence_length). The model
    itself comes back as it was: mode, device, precision and attention implementation.

    Nothing is left at `output_file` that failed a check; an older file stays until the new one is whole.

    Args:
        model: a transformers model with a head that gives logits.
        output_file: where to write, as a rule `…/onnx/model.onnx`.
        input_names: what the tokenizer gives, as a rule `tokenizer.model_input_names`; names that the
            model cannot use are left out. All that the model can use when None.
        opset_version: 23 needs onnxruntime 1.23 or later to run. Lower ones, down to 18, run in older
            versions, more slowly.

    Raises:
        ExportError: the model cannot be traced, or the file's logits differ from the model's by more than
            `divergence.tolerance`.
    """
    usable = model_input_names(model)
    names = usable if input_names is None else tuple(name for name in usable if name in input_names)
    output_file = Path(output_file)
    with deployed(model), _fused_attention(model):
        proto = _trace(model, names, opset_version)
        _store_tied_weights_once(proto)
        merge_heads(proto)
        add_by_sum(proto)
        remove_stacks(proto)
        with published_when_done(output_file) as unfinished:
            save_checked(proto, unfinished)
            verify_onnx(model, unfinished)
    return output_file


def _trace(model: nn.Module, names: Sequence[str], opset_version: int) -> ModelProto:
    # Two rows of which one is padded: a mask of ones alone could be traced as no mask at all.
    example = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}
    example["input_ids"] = torch.arange(16).reshape(2, 8) % 8 + 1
    if "attention_mask" in example:
        example["attention_mask"][1, 5:] = 0
    if "token_type_ids" in example:
        example["token_type_ids"][:, :4] = 0
    axes = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length")}
    with _silence():
        try:
            program = torch.onnx.export(
                LogitsOnly(model).eval(),
                (),
                kwargs=example,
                dynamo=True,
                opset_version=opset_version,
                dynamic_shapes={name: axes for name in names},
                input_names=list(names),
                output_names=list(output_names(model)),
                verbose=False,
            )
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(cause).strip().splitlines()
            raise ExportError(
                f"{type(model).__name__} cannot be exported to ONNX: {reason[0] if reason else type(cause)}"
            ) from error
    assert program is not None
    return program.model_proto


def _store_tied_weights_once(proto: ModelProto) -> None:
    """Where a matrix is stored along with its own transpose, keeps one and a Transpose node.

    A language model's word embeddings are tied to its output layer; the exporter stores the table for
    the look-up and its transpose for the product. onnxruntime transposes once, when the file is loaded.
    """
    graph = proto.graph
    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    tables = {name: numpy_helper.to_array(weights[name]) for name in looked_up & weights.keys()}
    for tensor in list(graph.initializer):
        for name, table in tables.items():
            if tensor.name == name or list(tensor.dims) != list(table.shape[::-1]) or table.ndim != 2:
                continue
            if np.array_equal(numpy_helper.to_array(tensor), table.T):
                transpose = onnx.helper.make_node(
                    "Transpose", [name], [tensor.name], f"transpose_{tensor.name}", perm=[1, 0]
                )
                graph.initializer.remove(tensor)
                graph.node.insert(0, transpose)
                break


def save_checked(proto: ModelProto, file: Path) -> None:
    """Writes the file and has the ONNX checker look through it.

    Raises:
        ExportError: it would be larger than 2 GB, protobuf's limit.
    """
    try:
        onnx.save(proto, file)
    except ValueError as error:
        raise ExportError(f"the model is too large for one ONNX file: {error}") from error
    onnx.checker.check_model(file, full_check=True)


@contextlib.contextmanager
def _fused_attention(model: nn.Module) -> Iterator[None]:
    """Has the model call PyTorch's fused attention, which the exporter turns into one operator."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before in (None, "sdpa") or not getattr(model, "_supports_sdpa", False):
        yield
        return
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps the exporter's progress, notes and deprecations off the screen, and the graph it prints where it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    unread = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
