"""The end of the road: a trained model becomes files that are checked, measured and reported."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunelle.compression.quantization import QuantizationPlan
from prunelle.compression.record import versions
from prunelle.export.checkpoint import speak_to_transformers_4
from prunelle.export.evaluation import LOWER_IS_BETTER, ComputeMetrics, Evaluation, Reader, evaluate
from prunelle.export.hardware import hardware
from prunelle.export.inference import deployed, maximum_length, vocabulary_size
from prunelle.export.latency import SHAPES, Latency, measure_latency
from prunelle.export.onnx import OPSET_VERSION
from prunelle.export.report import ModelReport, Report
from prunelle.export.runner import Batch, OnnxRunner, Runner, TorchRunner
from prunelle.export.variants import VARIANTS, export_variants, variant_of

FP32_FILE = VARIANTS["fp32"].file
INT8_FILE = VARIANTS["int8-dynamic"].file

POINT = 0.01  # of a metric that runs from 0 to 1


def export_and_report(
    student: nn.Module,
    tokenizer: Any,
    output_dir: str | Path,
    *,
    batches: Iterable[Batch],
    compute_metrics: ComputeMetrics,
    reader: Reader | None = None,
    teacher: nn.Module | None = None,
    teacher_folder: str | Path | None = None,
    shapes: Sequence[str] = SHAPES,
    latency_seconds: float = 20.0,
    opset_version: int = OPSET_VERSION,
    plan: QuantizationPlan | None = None,
) -> Report:
    """Exports the student to float32 and int8 ONNX, compares teacher, student and files, and writes it down.

    Writes `onnx/model.onnx`, `onnx/model_quantized.onnx` (or the file of the plan's scheme),
    `report.json` and `report.md` into `output_dir`.
    In a run of several processes one of them calls this.

    Args:
        student: the model to deploy, masks and fake quantizers baked in. Its name in the report is
            `student`, and flips and logit differences are counted against it.
        tokenizer: says which inputs the files take and how long they can be.
        output_dir: a folder, made if need be. Where it holds the student's safetensors files, these give
            the student's size.
        teacher: the model that the student learned from, the first row and the base of the speed-ups.
            Without one that is the student.
        teacher_folder: the teacher's checkpoint, for its size on disk.
        opset_version: as `export_onnx` takes it.
        plan: as `export_variants` takes it.
        batches, compute_metrics, reader, shapes, latency_seconds: as `report_on` takes them.

    Raises:
        ExportError: the student cannot be exported, or its float32 file does not compute what it computes.
        InputError: the data cannot be evaluated.
    """
    files = export_variants(
        student,
        output_dir,
        ("fp32", "int8-dynamic" if plan is None else variant_of(plan)),
        input_names=tokenizer.model_input_names,
        opset_version=opset_version,
        plan=plan,
    )
    report = report_on(
        student,
        files,
        tokenizer,
        name="student",
        folder=output_dir,
        batches=batches,
        compute_metrics=compute_metrics,
        reader=reader,
        teacher=teacher,
        teacher_folder=teacher_folder,
        shapes=shapes,
        latency_seconds=latency_seconds,
    )
    report.save(output_dir)
    speak_to_transformers_4(Path(output_dir))
    return report


def report_on(
    model: nn.Module,
    files: Mapping[str, Path],
    tokenizer: Any,
    *,
    batches: Iterable[Batch],
    compute_metrics: ComputeMetrics,
    reader: Reader | None = None,
    name: str = "model",
    folder: str | Path | None = None,
    teacher: nn.Module | None = None,
    teacher_folder: str | Path | None = None,
    shapes: Sequence[str] = SHAPES,
    latency_seconds: float = 20.0,
) -> Report:
    """Compares a model with its files, and with the teacher that it had, on the CPU.

    The models are evaluated in float32, and come back as they were.

    Args:
        model: what the files were exported from; flips and logit differences are counted against it.
        files: as `export_variants` gives them.
        tokenizer: says how long inputs can be.
        batches: evaluation data as `evaluate` takes it, with `labels`. Gone through once.
        compute_metrics, reader: as `evaluate` takes them.
        name: the model's in the report.
        folder: the model's checkpoint, for its size on disk; without one that of its weights.
        teacher: the first row and the base of the speed-ups, which without one is the model.
        teacher_folder: as `folder`.
        shapes: where to measure latency, batch x tokens.
        latency_seconds: how long to measure it, in all.

    Raises:
        InputError: the data cannot be evaluated.
    """
    models = [model] if teacher is None else [teacher, model]
    with deployed(*models):
        reference = TorchRunner(model, name, folder=folder)
        runners: list[Runner] = [reference]
        if teacher is not None:
            runners.insert(0, TorchRunner(teacher, "teacher", folder=teacher_folder))
        for variant, file in files.items():
            label = VARIANTS[variant].name
            runners.append(OnnxRunner(file, label, parameters=reference.parameters, format=label))
        evaluations = evaluate(runners, batches, compute_metrics, reference=reference, reader=reader)
        latencies = measure_latency(
            runners,
            shapes=shapes,
            vocabulary=min(map(vocabulary_size, models)),
            maximum_length=min(tokenizer.model_max_length, *(maximum_length(each) for each in models)),
            seconds=latency_seconds,
        )

    rows = rows_of(runners, evaluations, latencies)
    machine = hardware()
    return Report(name, rows, machine, versions(), _warnings(name, rows, machine))


def rows_of(
    runners: Sequence[Runner], evaluations: Sequence[Evaluation], latencies: Sequence[Mapping[str, Latency]]
) -> list[ModelReport]:
    """One row a model. Speed-ups are over the first."""
    return [
        ModelReport(
            name=runner.name,
            format=runner.format,
            metrics=evaluation.metrics,
            size_bytes=runner.size_bytes,
            parameters=runner.parameters,
            latency_ms=dict(latency),
            speedup={shape: latencies[0][shape].p50 / latency[shape].p50 for shape in latency},
            flips=evaluation.flips,
            total=evaluation.total,
            max_abs_logit_difference=evaluation.max_abs_logit_difference,
        )
        for runner, evaluation, latency in zip(runners, evaluations, latencies, strict=True)
    ]


def _warnings(reference: str, rows: Sequence[ModelReport], machine: dict[str, Any]) -> list[str]:
    (original,) = (row for row in rows if row.name == reference)
    files = [row for row in rows if row.format.startswith("onnx")]
    found = []
    for row in files:
        for metric, value in original.metrics.items():
            lost = value - row.metrics[metric]
            if metric not in LOWER_IS_BETTER and not lost <= POINT:  # so written that NaN warns
                found.append(
                    f"{row.name} loses {100 * lost:.1f} points of {metric}: {value:.4f} in the {reference}, "
                    f"{row.metrics[metric]:.4f} in {row.name}."
                )
    int8 = " and ".join(row.name for row in files if "int8" in row.format)
    if int8 and machine["int8_instructions"] == []:
        found.append(
            f"this CPU ({machine['cpu']}) has no int8 instructions, so {int8} will be faster than the latency here "
            "says on one with AVX-512 VNNI, AVX-VNNI, AMX or ARM's dot product."
        )
    return found
