"""The end of the road: a trained model becomes files that are checked, measured and reported."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunelle.compression.record import versions
from prunelle.export.evaluation import ComputeMetrics, evaluate
from prunelle.export.hardware import hardware
from prunelle.export.inference import deployed, maximum_length
from prunelle.export.latency import SHAPES, measure_latency
from prunelle.export.onnx import OPSET_VERSION, export_onnx
from prunelle.export.quantization import quantize_dynamic
from prunelle.export.report import ModelReport, Report
from prunelle.export.runner import Batch, OnnxRunner, Runner, TorchRunner

# transformers.js and optimum look for these.
FP32_FILE = Path("onnx") / "model.onnx"
INT8_FILE = Path("onnx") / "model_quantized.onnx"

POINT = 0.01  # of a metric that runs from 0 to 1


def export_and_report(
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
    opset_version: int = OPSET_VERSION,
) -> Report:
    """Exports the student to float32 and int8 ONNX, compares teacher, student and files, and writes it down.

    Writes `onnx/model.onnx`, `onnx/model_quantized.onnx`, `report.json` and `report.md` into `output_dir`.
    The models are evaluated on the CPU in float32, and come back as they were. In a run of several
    processes one of them calls this.

    Args:
        student: the model to deploy, masks and fake quantizers baked in. Its name in the report is
            `student`, and flips and logit differences are counted against it.
        tokenizer: says which inputs the files take and how long they can be.
        output_dir: a folder, made if need be. Where it holds the student's safetensors files, these give
            the student's size.
        batches: evaluation data as `evaluate` takes it, with `labels`. Gone through once.
        compute_metrics: as `evaluate` takes it.
        teacher: the model that the student learned from, the first row and the base of the speed-ups.
            Without one that is the student.
        teacher_folder: the teacher's checkpoint, for its size on disk.
        shapes: where to measure latency, batch x tokens.
        latency_seconds: how long to measure it, in all.
        opset_version: as `export_onnx` takes it.

    Raises:
        ExportError: the student cannot be exported, or its float32 file does not compute what it computes.
        InputError: the data cannot be evaluated.
    """
    output_dir = Path(output_dir)
    fp32_file = export_onnx(
        student,
        output_dir / FP32_FILE,
        input_names=tokenizer.model_input_names,
        opset_version=opset_version,
    )
    int8_file = quantize_dynamic(fp32_file, output_dir / INT8_FILE)

    models = [student] if teacher is None else [teacher, student]
    with deployed(*models):
        reference = TorchRunner(student, "student", folder=output_dir)
        runners: list[Runner] = [
            reference,
            OnnxRunner(fp32_file, "onnx", parameters=reference.parameters),
            OnnxRunner(int8_file, "onnx-int8", parameters=reference.parameters, format="onnx-int8"),
        ]
        if teacher is not None:
            runners.insert(0, TorchRunner(teacher, "teacher", folder=teacher_folder))
        evaluations = evaluate(runners, batches, compute_metrics, reference=reference)
        latencies = measure_latency(
            runners,
            shapes=shapes,
            vocabulary=student.get_input_embeddings().num_embeddings,  # type: ignore[operator]
            maximum_length=min(tokenizer.model_max_length, *(maximum_length(model) for model in models)),
            seconds=latency_seconds,
        )

    rows = [
        ModelReport(
            name=runner.name,
            format=runner.format,
            metrics=evaluation.metrics,
            size_bytes=runner.size_bytes,
            parameters=runner.parameters,
            latency_ms=latency,
            speedup={shape: latencies[0][shape].p50 / latency[shape].p50 for shape in latency},
            flips=evaluation.flips,
            total=evaluation.total,
            max_abs_logit_difference=evaluation.max_abs_logit_difference,
        )
        for runner, evaluation, latency in zip(runners, evaluations, latencies, strict=True)
    ]
    machine = hardware()
    report = Report("student", rows, machine, versions(), _warnings(rows, machine))
    report.save(output_dir)
    return report


def _warnings(rows: Sequence[ModelReport], machine: dict[str, Any]) -> list[str]:
    by_name = {row.name: row for row in rows}
    student, int8 = by_name["student"], by_name["onnx-int8"]
    found = []
    for metric, value in student.metrics.items():
        lost = value - int8.metrics[metric]
        if metric != "loss" and not lost <= POINT:  # so written that NaN warns
            found.append(
                f"onnx-int8 loses {100 * lost:.1f} points of {metric}: {value:.4f} in the student, "
                f"{int8.metrics[metric]:.4f} in int8."
            )
    if machine["int8_instructions"] == []:
        found.append(
            f"this CPU ({machine['cpu']}) has no int8 instructions: onnx-int8 runs faster on one with "
            "AVX-512 VNNI, AVX-VNNI, AMX or ARM's dot product than its latency here says."
        )
    return found
