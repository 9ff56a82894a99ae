"""A comparison as report.json, report.md, one self-contained report.html, and text for a terminal."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from prunelle.export import pictures
from prunelle.export.comparison import ClassChange, Comparison, Flip, Judgement
from prunelle.export.markup import Markup, join, tag
from prunelle.export.report import finite, markdown_table, text_table
from prunelle.export.weights import ZLIB_LEVEL

FLIPS_IN_MARKDOWN = 20

FLIP_HEAD = ["example", "text", "true", "reference", "candidate"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; } p, ul { margin: .4rem 0; } .quiet { color: #666; font-size: 13px; }
.warning { background: #fff4e0; border-left: 4px solid #e69f00; padding: .4rem .8rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 12.5px; margin: .6rem 0; }
th, td { padding: .25rem .45rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
.flips td, .flips th { text-align: left; vertical-align: top; } .flips td:nth-child(2) { white-space: normal; }
.worse { color: #b23c00; font-weight: 600; } .better { color: #00704f; font-weight: 600; }
.chip { display: inline-block; min-width: 1.35em; line-height: 1.35em; border-radius: .7em; color: #fff;
        text-align: center; font-size: 12px; font-weight: 700; margin-right: .45em; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } figure { margin: 0; }
figcaption { font-size: 13px; font-weight: 600; } svg { font-family: inherit; max-width: 100%; }
summary { cursor: pointer; margin: .6rem 0; }
"""


def save(comparison: Comparison, folder: Path) -> None:
    """Writes report.json, report.md and report.html into a folder that is there."""
    content = json.dumps(to_dict(comparison), indent=2, allow_nan=False, ensure_ascii=False, default=str) + "\n"
    texts = {"report.json": content, "report.md": to_markdown(comparison), "report.html": to_html(comparison)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The content of report.json: that of a `Report`, and more."""
    content = comparison.report.to_dict()
    for row, report, model in zip(content["models"], comparison.report.models, comparison.models, strict=True):
        row["compressed_bytes"] = model.weights.compressed_bytes
        row["nonzero_parameters"] = model.weights.nonzero_parameters
        row |= asdict(model.footprint)
        row["examples_per_second"] = {
            shape: _rows_of(shape) * latency.calls_per_second for shape, latency in report.latency_ms.items()
        }
        row["latency_calls"] = {shape: len(latency.milliseconds) for shape, latency in report.latency_ms.items()}
        if model.weights.density:
            row["density"] = model.weights.density
        if model.confusion is not None:
            row["confusion"] = model.confusion.tolist()
        if model.judgement is not None:
            judgement = asdict(model.judgement)
            row["flips"]["examples"] = judgement.pop("flips")
            row["against_reference"] = judgement
    content["compression"] = f"zlib level {ZLIB_LEVEL}"
    content["data"] = comparison.data
    content["classes"] = comparison.classes
    content["recipe"] = comparison.recipe
    content["warnings"] = comparison.report.warnings
    return finite(content)


def to_text(comparison: Comparison) -> str:
    """Both tables and the verdicts, for a terminal."""
    verdicts = [f"{name}: {judgement.verdict}" for name, judgement in _judgements(comparison)]
    return "\n".join([text_table(_cost_cells(comparison)), "", comparison.report.to_text(), "", *verdicts])


def to_markdown(comparison: Comparison) -> str:
    """The report without its pictures."""
    report = comparison.report
    parts = [
        f"# Comparison with {_quote(report.reference)}",
        _quote(_data_line(comparison)),
        "\n".join(f"- **{_quote(name)}**: {judgement.verdict}" for name, judgement in _judgements(comparison)),
        *(f"> **Warning:** {_quote(text)}" for text in report.warnings),
        markdown_table(_quoted(report.cells())),
        markdown_table(_quoted(_cost_cells(comparison))),
        f"{_quote(report.legend())} {_cost_legend()}",
    ]
    if comparison.classes is not None and len(comparison.classes) <= pictures.NUMBERED_CLASSES:
        parts.append("## Confusion matrices\n\nTrue classes in rows, predicted ones in columns.")
        for row, model in zip(report.models, comparison.models, strict=True):
            assert model.confusion is not None
            head = [row.name, *comparison.classes]
            cells = [
                [name, *map(str, counts)]
                for name, counts in zip(comparison.classes, model.confusion.tolist(), strict=True)
            ]
            parts.append(markdown_table(_quoted([head, *cells])))
    for name, judgement in _judgements(comparison):
        parts.append(f"## {_quote(name)}\n\n{_classes_line(judgement, _quote)}")
        if judgement.flips:
            rows = [_flip_cells(flip) for flip in judgement.flips[:FLIPS_IN_MARKDOWN]]
            parts.append(f"{_flips_line(comparison, name, len(rows))}\n\n{markdown_table(_quoted([FLIP_HEAD, *rows]))}")
    parts.append(report.versions_line())
    return "\n\n".join(parts) + "\n"


def to_html(comparison: Comparison) -> Markup:
    """One page that needs nothing else: styles and pictures stand in it, and it runs no script."""
    report = comparison.report
    title = f"Comparison with {report.reference}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # should a text ever get past the escaping
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    body = tag(
        "body",
        tag("h1", title),
        tag("p", _data_line(comparison), class_="quiet"),
        tag(
            "ul",
            *(
                tag("li", _chip(number), tag("b", name), f": {judgement.verdict}.")
                for number, (name, judgement) in enumerate(_judgements(comparison), start=1)
            ),
        ),
        *(tag("p", text, class_="warning") for text in report.warnings),
        tag("h2", "Accuracy over latency"),
        _bubbles(comparison),
        tag("p", "The area of a bubble is the size on disk.", class_="quiet"),
        tag("h2", "Figures"),
        _figures_table(report.cells()),
        _figures_table(_cost_cells(comparison)),
        tag("p", f"{report.legend()} {_cost_legend()}", class_="quiet"),
        tag("h2", "Latency"),
        _distributions(comparison),
        tag(
            "p",
            "Box: the middle half of the calls; line: 5 % to 95 %; bar: the median; dot: the 99th percentile.",
            class_="quiet",
        ),
        *_densities(comparison),
        *_confusions(comparison),
        *(
            _changes(comparison, number, name, judgement)
            for number, (name, judgement) in enumerate(_judgements(comparison), start=1)
        ),
        tag("p", report.versions_line(), class_="quiet"),
    )
    return Markup(f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n")


def _judgements(comparison: Comparison) -> list[tuple[str, Judgement]]:
    """The candidates' names and judgements: all models but the first."""
    return [
        (row.name, model.judgement)
        for row, model in zip(comparison.report.models, comparison.models, strict=True)
        if model.judgement is not None
    ]


def _data_line(comparison: Comparison) -> str:
    data = comparison.data
    return f"{data['task']} on {data['examples']:,} examples of {data['source']} ({data['split']})."


def _cost_cells(comparison: Comparison) -> list[list[str]]:
    """The second table: what a model costs to store, to load and to serve."""
    shapes = list(comparison.report.models[0].latency_ms)
    head = ["model", "zlib MB", "non-zero", "load s", "memory MB"]
    head += [cell for shape in shapes for cell in (f"{shape} p99 ms", "examples/s")]
    rows = []
    for report, model in zip(comparison.report.models, comparison.models, strict=True):
        nonzero = model.weights.nonzero_parameters
        row = [
            report.name,
            f"{model.weights.compressed_bytes / 1e6:.1f}",
            "unknown" if nonzero is None else f"{100 * nonzero / max(model.weights.parameters, 1):.1f} %",
            f"{model.footprint.load_seconds:.2f}",
            f"{model.footprint.peak_memory_bytes / 1e6:.0f}",
        ]
        for shape in shapes:
            latency = report.latency_ms[shape]
            row += [f"{latency.p99:.1f}", f"{_rows_of(shape) * latency.calls_per_second:,.0f}"]
        rows.append(row)
    return [head, *rows]


def _cost_legend() -> str:
    return (
        f"zlib: the weights compressed at level {ZLIB_LEVEL}. Load: from files in the system's cache to the first "
        "answer, in a fresh process. Memory: what that process grew by at its peak, over loading and one call at each "
        "shape."
    )


def _rows_of(shape: str) -> int:
    return int(shape.split("x")[0])


def _classes_line(judgement: Judgement, quote: Any = str) -> str:
    """The classes that lost examples, in a sentence."""
    worse = sorted((each for each in judgement.classes if _lost(each) > 0), key=_lost, reverse=True)
    if not judgement.classes:
        return f"{_capital(judgement.verdict)}."
    if not worse:
        return "No class got worse."
    return "Worse: " + "; ".join(
        f"{quote(each.name)}, {each.right:,} of {each.examples:,} right after {each.reference_right:,}"
        for each in worse
    ) + "."  # fmt: skip


def _capital(sentence: str) -> str:
    """With a capital first; `str.capitalize` would take McNemar's away."""
    return sentence[:1].upper() + sentence[1:]


def _lost(change: ClassChange) -> int:
    return change.reference_right - change.right


def _flips_line(comparison: Comparison, name: str, shown: int) -> str:
    (row,) = (row for row in comparison.report.models if row.name == name)
    if shown < row.flips:
        return f"Changed predictions, the {shown:,} of {row.flips:,} of which the reference was surest:"
    return f"Changed predictions ({row.flips:,}), those of which the reference was surest first:"


def _flip_cells(flip: Flip) -> list[str]:
    return [
        f"{flip.example:,}",
        flip.text,
        flip.label,
        f"{flip.reference} ({flip.reference_margin:.2f})",
        f"{flip.candidate} ({flip.margin:.2f})",
    ]


def _quote(text: str) -> str:
    """Text that Markdown shows as it is: HTML, links, emphasis and the borders of tables are spelt out."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _quoted(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[_quote(cell) for cell in row] for row in cells]


def _chip(index: int) -> Markup:
    return tag("span", str(index + 1), class_="chip", style=f"background: {pictures.colour(index)}")


def _figures_table(cells: Sequence[Sequence[str]]) -> Markup:
    head, *rows = cells
    return tag(
        "div",
        tag(
            "table",
            tag("tr", *(tag("th", cell) for cell in head)),
            *(
                tag("tr", tag("td", _chip(number), row[0]), *(tag("td", cell) for cell in row[1:]))
                for number, row in enumerate(rows)
            ),
        ),
        class_="scroll",
    )


def _bubbles(comparison: Comparison) -> Markup:
    rows = comparison.report.models
    metric = next(name for name in ("accuracy", *rows[0].metrics) if name in rows[0].metrics)
    return tag(
        "div",
        *(
            tag(
                "figure",
                tag("figcaption", f"{shape} (batch x tokens)"),
                pictures.bubbles(
                    metric.replace("_", " "),
                    [row.metrics[metric] for row in rows],
                    [row.latency_ms[shape].p50 for row in rows],
                    [row.size_bytes for row in rows],
                ),
            )
            for shape in rows[0].latency_ms
        ),
        class_="row",
    )


def _distributions(comparison: Comparison) -> Markup:
    rows = comparison.report.models
    return tag(
        "div",
        *(
            tag(
                "figure",
                tag("figcaption", f"{shape} (batch x tokens)"),
                pictures.distributions([row.latency_ms[shape] for row in rows]),
            )
            for shape in rows[0].latency_ms
        ),
        class_="row",
    )


def _densities(comparison: Comparison) -> list[Markup]:
    figures = [
        tag(
            "figure",
            tag("figcaption", _chip(number), row.name),
            pictures.densities(model.weights.density, model.weights.kept_layers),
        )
        for number, (row, model) in enumerate(zip(comparison.report.models, comparison.models, strict=True))
        if model.weights.density
    ]
    if not figures:
        return []
    note = "What pruning left of each matrix, by layer; of the other models nothing was pruned, or they are ONNX files."
    return [tag("h2", "Density"), tag("div", *figures, class_="row"), tag("p", note, class_="quiet")]


def _confusions(comparison: Comparison) -> list[Markup]:
    first = comparison.models[0].confusion
    if comparison.classes is None or first is None:
        return []
    if len(comparison.classes) > pictures.DRAWN_CLASSES:
        note = f"{len(comparison.classes)} classes are too many to draw; report.json holds the numbers."
        return [tag("h2", "Confusion matrices"), tag("p", note)]
    figures = [
        tag(
            "figure",
            tag("figcaption", _chip(number), row.name),
            pictures.confusion(model.confusion, first, comparison.classes, number),
        )
        for number, (row, model) in enumerate(zip(comparison.report.models, comparison.models, strict=True))
        if model.confusion is not None
    ]
    note = "Shaded by the share of the true class; in brackets the difference from the reference."
    return [tag("h2", "Confusion matrices"), tag("div", *figures, class_="row"), tag("p", note, class_="quiet")]


def _changes(comparison: Comparison, index: int, name: str, judgement: Judgement) -> Markup:
    parts = [
        tag("h2", _chip(index), f"What changed: {name}"),
        tag("p", f"{_capital(judgement.verdict)}. Agreement: {100 * judgement.agreement:.2f} %."),
    ]
    if judgement.classes:
        parts.append(tag("p", _classes_line(judgement)))
    if judgement.flips:
        rows = [
            tag("tr", *(tag("td", cell, class_=style) for cell, style in zip(_flip_cells(flip), styles, strict=True)))
            for flip in judgement.flips
            for styles in [[None, None, None, _style(flip.reference, flip), _style(flip.candidate, flip)]]
        ]
        summary = tag("summary", _flips_line(comparison, name, len(rows)))
        table = tag("table", tag("tr", *(tag("th", cell) for cell in FLIP_HEAD)), *rows, class_="flips")
        parts.append(tag("details", summary, table, open="open"))
    return join(*parts)


def _style(predicted: str, flip: Flip) -> str:
    return "better" if predicted == flip.label else "worse"
