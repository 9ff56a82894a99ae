"""Which modules to leave in float32, the fewest, so that an int8 file loses no more than it may."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from prunelle.compression.quantization import QuantizationPlan
from prunelle.export.arguments import ExportArguments
from prunelle.export.checkpoint import Checkpoint
from prunelle.export.data import Examples
from prunelle.export.evaluation import LOWER_IS_BETTER, ComputeMetrics, evaluate
from prunelle.export.files import published_when_done
from prunelle.export.inference import ExportError, maximum_length
from prunelle.export.latency import SHAPES, Latency, measure_latency
from prunelle.export.quantization import quantizable_modules, quantize_dynamic
from prunelle.export.runner import Batch, Logits, OnnxRunner
from prunelle.export.variants import variant_of
from prunelle.export.verification import verify_runs
from prunelle.tasks import Task

PROBED_BATCHES = 4  # enough to tell modules apart; what is chosen is judged on all of the data


@dataclass(frozen=True)
class Choice:
    """What is left in float32, what that keeps, and what it costs.

    Attributes:
        modules: qualified names, the most sensitive first; none where nothing had to be left out.
        of: how many there are to choose from.
        drop: the largest fall of a metric against the float32 file, in points, of the file chosen.
        drop_of_all: of the file with everything quantized.
        latency: of the file chosen, by shape.
        latency_of_all: of the file with everything quantized, measured beside it.
    """

    modules: list[str]
    of: int
    drop: float
    drop_of_all: float
    latency: Mapping[str, Latency]
    latency_of_all: Mapping[str, Latency]

    def to_text(self) -> str:
        """The choice in a sentence or two."""
        if not self.modules:
            return f"int8: everything is quantized, and loses {self.drop:.2f} points on the validation data."
        cost = ", ".join(
            f"{self.latency[shape].p50:.1f} ms instead of {self.latency_of_all[shape].p50:.1f} at {shape}"
            for shape in self.latency
        )
        return (
            f"int8: {len(self.modules)} of {self.of} modules are left in float32 ({', '.join(self.modules)}), so that "
            f"it loses {self.drop:.2f} points on the validation data instead of {self.drop_of_all:.2f}. Cost: {cost}."
        )


def quantize_within(
    checkpoint: Checkpoint,
    files: Mapping[str, Path],
    task: Task | None,
    examples: Mapping[str, Examples],
    arguments: ExportArguments,
    shapes: Sequence[str] = SHAPES,
) -> Choice | None:
    """Writes the dynamic int8 file anew, so that it loses no more than `--max_accuracy_drop`; says what that took.

    Each module is quantized alone, and its sensitivity is how far that moves the logits (mean squared). The file is
    then made without the first of them, the most sensitive, without the first two, four, …, and by bisection with as
    few as keep to the limit. Metrics that do not fall in this order may allow for fewer still.

    Args:
        checkpoint: what the files were exported from.
        files: `fp32`, and `int8-dynamic`, which is replaced where it loses more.
        task: whose metrics count, all of them.
        examples: `validation` among them. Gone through several times.
        arguments: the limit, and how long to measure latency in all.
        shapes: where to measure it, batch x tokens.

    Returns:
        The choice; None where there is no limit.

    Raises:
        ExportError: the file loses more whichever modules are left out.
    """
    if task is None or arguments.max_accuracy_drop is None:
        return None
    plan = checkpoint.plan if checkpoint.plan and variant_of(checkpoint.plan) == "int8-dynamic" else None
    with tempfile.TemporaryDirectory() as folder:
        search = _Search(files["fp32"], Path(folder), examples["validation"], task.compute_metrics, plan)
        modules, drop = search.fewest(arguments.max_accuracy_drop)
        latency, latency_of_all = measure_latency(
            [search.quantized(modules), search.quantized(())],
            shapes=shapes,
            vocabulary=checkpoint.model.get_input_embeddings().num_embeddings,
            maximum_length=min(checkpoint.tokenizer.model_max_length, maximum_length(checkpoint.model)),
            seconds=arguments.latency_seconds,
        )
    if modules:
        with published_when_done(files["int8-dynamic"]) as unfinished:
            quantize_dynamic(files["fp32"], unfinished, plan=plan, left_out=modules)
            verify_runs(checkpoint.model, unfinished)
    return Choice(modules, len(search.modules), drop, search.drop(()), latency, latency_of_all)


class _Search:
    def __init__(
        self,
        fp32_file: Path,
        folder: Path,
        examples: Examples,
        compute_metrics: ComputeMetrics,
        plan: QuantizationPlan | None,
    ) -> None:
        self.fp32_file, self.folder, self.examples, self.compute_metrics = fp32_file, folder, examples, compute_metrics
        self.plan = plan
        self.modules = quantizable_modules(fp32_file, plan)
        self.original = OnnxRunner(fp32_file, "onnx", parameters=0)
        self.metrics = self._measured(self.original)
        self.drops: dict[tuple[str, ...], float] = {}

    def fewest(self, max_drop: float) -> tuple[list[str], float]:
        """As few modules as keep the drop within the limit, the most sensitive; and the drop."""
        if self.drop(()) <= max_drop:
            return [], self.drop(())
        order = self._by_sensitivity()
        too_few, enough = 0, 1
        while enough < len(order) and self.drop(order[:enough]) > max_drop:
            too_few, enough = enough, 2 * enough
        enough = min(enough, len(order))
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            too_few, enough = (too_few, middle) if self.drop(order[:middle]) <= max_drop else (middle, enough)
        if enough == len(order):
            raise ExportError(
                f"--max_accuracy_drop {max_drop}: int8-dynamic loses more as long as one module is quantized; "
                "leave it out of --variants, or allow for more"
            )
        return order[:enough], self.drop(order[:enough])

    def drop(self, left_out: Sequence[str]) -> float:
        """How many points the worst metric falls when all but these modules are quantized."""
        key = tuple(left_out)
        if key not in self.drops:
            metrics = self._measured(self.quantized(left_out))
            self.drops[key] = max(100 * (self.metrics[name] - metrics[name]) for name in metrics)
        return self.drops[key]

    def quantized(self, left_out: Sequence[str]) -> OnnxRunner:
        """The model with all but these modules quantized."""
        file = quantize_dynamic(self.fp32_file, self.folder / "model.onnx", plan=self.plan, left_out=left_out)
        return OnnxRunner(file, "onnx-int8", parameters=0)

    def _by_sensitivity(self) -> list[str]:
        probe = list(islice(self.examples.batches, PROBED_BATCHES))
        expected = [_attended(self.original, batch) for batch in probe]

        def moved(module: str) -> float:
            runner = self.quantized([other for other in self.modules if other != module])
            found = [_attended(runner, batch) for batch in probe]
            return float(np.mean([np.square(a - b).mean() for a, b in zip(found, expected, strict=True)]))

        return sorted(self.modules, key=moved, reverse=True)

    def _measured(self, runner: OnnxRunner) -> dict[str, Any]:
        batches, reader = self.examples.batches, self.examples.reader
        (evaluation,) = evaluate([runner], batches, self.compute_metrics, reference=runner, reader=reader)
        return {name: value for name, value in evaluation.metrics.items() if name not in LOWER_IS_BETTER}


def _attended(runner: OnnxRunner, batch: Batch) -> Logits:
    logits = runner(batch)
    return logits if logits.ndim == 2 else logits[np.asarray(batch["attention_mask"]) == 1]
