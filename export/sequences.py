"""Encoder-decoders: what they write, held against the true texts and against each other. They are not exported."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunelle.compression.record import versions
from prunelle.export.deployment import rows_of
from prunelle.export.evaluation import IGNORED, ComputeMetrics, evaluate
from prunelle.export.hardware import hardware
from prunelle.export.inference import deployed, maximum_length
from prunelle.export.latency import SHAPES, measure_latency
from prunelle.export.report import Report
from prunelle.export.runner import Batch, Logits, TorchRunner
from prunelle.tasks import metrics

TOKENS_TIMED = 16

INPUT_NAMES = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


class NextTokens(TorchRunner):
    """An encoder-decoder asked for each token of a target whose earlier ones it is shown."""

    def __call__(self, batch: Batch) -> Logits:
        """Returns (batch, target tokens, vocabulary) logits."""
        inputs = {name: torch.as_tensor(batch[name]) for name in INPUT_NAMES if name in batch}
        with torch.inference_mode():
            return self.model(**inputs, use_cache=False).logits.float().numpy()


class Writer(TorchRunner):
    """An encoder-decoder that writes, the likeliest token each time: for latency, as many as are timed."""

    def __call__(self, batch: Batch) -> Logits:
        """Returns (batch, tokens) token ids."""
        return self.write(batch, TOKENS_TIMED, min_new_tokens=TOKENS_TIMED)

    def write(self, batch: Batch, tokens: int, **options: Any) -> Any:
        """At most so many tokens a text: (batch, tokens) token ids."""
        inputs = {name: torch.as_tensor(batch[name]) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            ids = self.model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=tokens, num_beams=1, do_sample=False, **options
            )
        return ids.numpy()


def report_on_sequences(
    student: nn.Module,
    tokenizer: Any,
    output_dir: str | Path,
    *,
    batches: Iterable[Batch],
    compute_metrics: ComputeMetrics,
    teacher: nn.Module | None = None,
    teacher_folder: str | Path | None = None,
    shapes: Sequence[str] = SHAPES,
    latency_seconds: float = 20.0,
) -> Report:
    """Compares a student that writes texts with its teacher, on the CPU in float32, and writes it down.

    Writes `report.json` and `report.md` into `output_dir`. Metrics of next tokens, flips and logit differences are
    measured along the true targets, as those of language models; `rougeL` and `exact_match` on texts that the models
    write by themselves, stopped at the length of the longest true target.

    Args:
        student: the model to deploy; flips and logit differences are counted against it.
        tokenizer: makes texts of token ids.
        output_dir: where the student's checkpoint is.
        batches: evaluation data with `decoder_input_ids` and `labels`. Gone through twice.
        compute_metrics: of next tokens, as `evaluate` takes it.
        teacher: the model that the student learned from, the first row and the base of the speed-ups. Without one
            that is the student.
        teacher_folder: the teacher's checkpoint, for its size on disk.
        shapes: of the texts that are read while latency is measured, batch x tokens.
        latency_seconds: how long to measure it, in all.
    """
    named = {} if teacher is None else {"teacher": (teacher, teacher_folder)}
    named["student"] = (student, output_dir)
    models = [model for model, _ in named.values()]
    with deployed(*models):
        readers = [NextTokens(model, name, folder=folder) for name, (model, folder) in named.items()]
        writers = [Writer(model, name, folder=folder) for name, (model, folder) in named.items()]
        evaluations = evaluate(readers, batches, compute_metrics, reference=readers[-1])
        for writer, evaluation in zip(writers, evaluations, strict=True):
            evaluation.metrics |= _text_metrics(writer, batches, tokenizer)
        latencies = measure_latency(
            writers,
            shapes=shapes,
            vocabulary=student.get_input_embeddings().num_embeddings,  # type: ignore[operator]
            maximum_length=min(tokenizer.model_max_length, *map(maximum_length, models)),
            seconds=latency_seconds,
        )
    report = Report(
        "student",
        rows_of(readers, evaluations, latencies),
        hardware(),
        versions(),
        ["encoder-decoders are not exported to ONNX: the folder holds the PyTorch student alone."],
        timed=f"batch x tokens read, {TOKENS_TIMED} tokens written",
    )
    report.save(output_dir)
    return report


def _text_metrics(writer: Writer, batches: Iterable[Batch], tokenizer: Any) -> dict[str, float]:
    targets = [np.asarray(batch["labels"]) for batch in batches]
    longest = max(labels.shape[1] for labels in targets)

    def texts(ids: Any) -> list[str]:
        return tokenizer.batch_decode(np.where(ids == IGNORED, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    written = [text for batch in batches for text in texts(writer.write(batch, longest))]
    return metrics.compute(
        [metrics.RougeL, metrics.ExactMatch], written, [text for labels in targets for text in texts(labels)]
    )
