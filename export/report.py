"""The table that closes a run, as text, Markdown and strict JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunelle.export.files import published_when_done
from prunelle.export.latency import Latency


@dataclass(frozen=True)
class ModelReport:
    """One row.

    Attributes:
        name: what the model is called.
        format: `torch`, `onnx`, `onnx-int8`, …
        metrics: by name; `loss` among them, lower is better there.
        size_bytes: of the weights file on disk.
        parameters: how many numbers were learned.
        latency_ms: by shape, batch x tokens.
        speedup: by shape, how many times faster than the first model of the report.
        flips: predictions that differ from the reference model's, of `total`.
        total: how many predictions were compared.
        max_abs_logit_difference: from the reference model's logits.
    """

    name: str
    format: str
    metrics: dict[str, float]
    size_bytes: int
    parameters: int
    latency_ms: dict[str, Latency]
    speedup: dict[str, float]
    flips: int
    total: int
    max_abs_logit_difference: float


@dataclass(frozen=True)
class Report:
    """What became of a model, in figures that were all measured in one run.

    Attributes:
        reference: the name of the model that flips and logit differences are counted against.
        models: the rows, the one that speed-ups are relative to first.
        hardware: what `hardware()` found.
        versions: of Python and of the packages that the figures depend on.
        warnings: what the reader must not overlook, one sentence each.
        timed: what a latency is of.
    """

    reference: str
    models: list[ModelReport]
    hardware: dict[str, Any]
    versions: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    timed: str = "batch x tokens"

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json. Figures that are not finite become None, which JSON can hold."""
        return finite(
            {
                "reference": self.reference,
                "models": [
                    {
                        "name": model.name,
                        "format": model.format,
                        "metrics": model.metrics,
                        "size_bytes": model.size_bytes,
                        "parameters": model.parameters,
                        "latency_ms": {
                            shape: {"p50": latency.p50, "p95": latency.p95, "p99": latency.p99}
                            for shape, latency in model.latency_ms.items()
                        },
                        "speedup": model.speedup,
                        "flips": {"count": model.flips, "total": model.total},
                        "max_abs_logit_difference": model.max_abs_logit_difference,
                    }
                    for model in self.models
                ],
                "hardware": self.hardware,
                "versions": self.versions,
            }
        )

    def to_text(self) -> str:
        """The table for a terminal, with what to know about it below."""
        warnings = [f"warning: {text}" for text in self.warnings]
        return "\n".join([text_table(self.cells()), "", self.legend(), *warnings])

    def to_markdown(self) -> str:
        """The same as a Markdown document."""
        notes = [f"> **Warning:** {text}\n" for text in self.warnings]
        return "\n".join(
            ["# Report", "", markdown_table(self.cells()), "", self.legend(), "", *notes, self.versions_line(), ""]
        )

    def save(self, folder: str | Path) -> None:
        """Writes report.json and report.md into the folder, each whole or not at all."""
        content = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        for name, text in (("report.json", content + "\n"), ("report.md", self.to_markdown())):
            with published_when_done(Path(folder) / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")

    def cells(self) -> list[list[str]]:
        """The table's head and rows. Latency is `p50 / p95`, the speed-up stands after it."""
        metrics = list(dict.fromkeys(name for model in self.models for name in model.metrics))
        shapes = list(self.models[0].latency_ms)
        head = ["model", "format", *metrics, "MB", "parameters"]
        head += [cell for shape in shapes for cell in (f"{shape} ms", "speed-up")]
        head += ["flips", "max logit diff"]
        rows = []
        for model in self.models:
            row = [model.name, model.format]
            row += [f"{model.metrics[name]:.4f}" if name in model.metrics else "" for name in metrics]
            row += [f"{model.size_bytes / 1e6:.1f}", f"{model.parameters / 1e6:.2f} M"]
            for shape in shapes:
                latency = model.latency_ms[shape]
                row += [f"{latency.p50:.1f} / {latency.p95:.1f}", f"{model.speedup[shape]:.2f}x"]
            row += [f"{model.flips} of {model.total:,}", f"{model.max_abs_logit_difference:.1e}"]
            rows.append(row)
        return [head, *rows]

    def versions_line(self) -> str:
        """What the figures depend on."""
        return "Versions: " + ", ".join(f"{name} {number}" for name, number in self.versions.items()) + "."

    def legend(self) -> str:
        """How to read the table."""
        instructions = self.hardware.get("int8_instructions")
        int8 = "unknown" if instructions is None else ", ".join(instructions) or "none"
        return (
            f"Latency: median / 95th percentile at {self.timed}, {self.hardware.get('threads')} threads of "
            f"{self.hardware.get('cpu')} (int8 instructions: {int8}). Speed-up: over {self.models[0].name}. "
            f"Flips and logit differences: against {self.reference}."
        )


def text_table(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the head first, in aligned columns; all but the first column to the right."""
    head, *rows = cells
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, ["-" * width for width in widths], *rows)
    )


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    head, *rows = cells
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def finite(value: Any) -> Any:
    """The value with None in place of every figure that is not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
