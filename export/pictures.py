"""The pictures of a report as inline SVG, and what pruning left as a file.

Drawn here and not by matplotlib: a few plain pictures do not pay for a dependency of 30 MB, and these are some
kilobytes of text that stays sharp, can be selected and takes the page's fonts.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunelle.export.latency import Latency
from prunelle.export.markup import Markup, join, tag

# Told apart by colour-blind readers too (Okabe and Ito, without yellow). Every mark bears its model's number besides.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")

GREY, RULE, INK = "#777", "#ddd", "#222"

TEXT_STYLE: dict[str, str | float] = {"fill": GREY, "font_size": 12}

NUMBERED_CLASSES = 12  # cells of larger matrices have no room for a number
DRAWN_CLASSES = 40


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def bubbles(metric: str, values: Sequence[float], milliseconds: Sequence[float], sizes: Sequence[int]) -> Markup:
    """A metric, such as accuracy, over latency, one bubble a model, its area in proportion to its size on disk.

    Latency is drawn on a logarithmic scale, where equal steps are equal speed-ups.
    """
    width, height, left, right, top, bottom = 340, 250, 52, 16, 18, 42
    low, high = _padded(values, share=0.25, least=0.01)
    fastest, slowest = min(milliseconds) / 1.35, max(milliseconds) * 1.35
    across = _scale(math.log(fastest), math.log(slowest), left, width - right)
    up = _scale(low, high, height - bottom, top)
    parts = [
        *_horizontal_grid(_ticks(low, high, 5), up, left, width - right),
        *_vertical_ticks(_log_ticks(fastest, slowest), lambda value: across(math.log(value)), height - bottom, top),
        _text(left + (width - left - right) / 2, height - 8, "ms a call (median, logarithmic)", text_anchor="middle"),
        _text(4, 11, metric),
    ]
    largest = max(sizes)
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])  # small ones on top of large ones
    for index in order:
        x, y, radius = (
            across(math.log(milliseconds[index])),
            up(values[index]),
            20 * (sizes[index] / largest) ** 0.5,
        )
        title = f"{metric} {values[index]:.4f}, {milliseconds[index]:.2f} ms, {sizes[index] / 1e6:.1f} MB"
        parts.append(
            tag(
                "g",
                tag("title", title),
                tag("circle", cx=x, cy=y, r=max(radius, 4.0), fill=colour(index), fill_opacity="0.55", stroke="#fff"),
                _text(x, y + 4, str(index + 1), text_anchor="middle", font_weight="bold", fill=INK),
            )
        )
    return _svg(width, height, *parts)


def distributions(latencies: Sequence[Latency]) -> Markup:
    """How latencies spread, one row a model: the middle half as a box, 5 % to 95 % as a line, p99 as a dot."""
    width, left, right, row, top, bottom = 340, 26, 14, 26, 6, 38
    height = top + row * len(latencies) + bottom
    # From 0, so that lengths compare; a model far slower than the rest must not be cut, rare stragglers may.
    across = _scale(0.0, 1.04 * max(latency.p99 for latency in latencies), left, width - right)
    floor = height - bottom
    parts = _vertical_ticks(_ticks(0.0, 1.04 * max(latency.p99 for latency in latencies), 5), across, floor, top)
    for index, latency in enumerate(latencies):
        middle = top + row * (index + 0.5)
        low, quarter, median, three_quarters, high = (across(latency.percentile(q)) for q in (5, 25, 50, 75, 95))
        title = f"p50 {latency.p50:.2f}, p95 {latency.p95:.2f}, p99 {latency.p99:.2f} ms"
        parts.append(
            tag(
                "g",
                tag("title", f"{title} ({len(latency.milliseconds)} calls)"),
                _text(left - 8, middle + 4, str(index + 1), text_anchor="end", font_weight="bold", fill=INK),
                tag("line", x1=low, x2=high, y1=middle, y2=middle, stroke=colour(index), stroke_width=2),
                tag(
                    "rect",
                    x=quarter,
                    y=middle - 7,
                    width=max(three_quarters - quarter, 1.5),
                    height=14,
                    fill=colour(index),
                    fill_opacity="0.55",
                ),
                tag("line", x1=median, x2=median, y1=middle - 9, y2=middle + 9, stroke=INK, stroke_width=2),
                tag("circle", cx=across(latency.p99), cy=middle, r=3, fill=colour(index)),
            )
        )
    parts.append(_text(left + (width - left - right) / 2, height - 8, "ms a call", text_anchor="middle"))
    return _svg(width, height, *parts)


def confusion(matrix: NDArray[np.int64], reference: NDArray[np.int64], classes: Sequence[str], index: int) -> Markup:
    """True classes in rows, predicted ones in columns, shaded by their share of the row.

    A number in brackets is the difference from the reference's matrix.
    """
    count = len(classes)
    cell = 62 if count <= 4 else 44 if count <= NUMBERED_CLASSES else 14
    longest = min(max(map(len, classes)), 14)
    left, top = 24 + 7 * longest, 40 if count <= 4 else 30 + 6 * longest
    width, height = left + cell * count + 8, top + cell * count + 6
    parts = [_text(left, 12, "predicted"), _text(4, top - 8, "true")]
    for number, name in enumerate(classes):
        middle = cell * (number + 0.5)
        x, y = left + middle, top - 8
        # Side by side where there is room, else upright.
        turn = {"text_anchor": "middle"} if count <= 4 else {"transform": f"rotate(-90 {x + 4:.0f} {y})"}
        parts.append(_text(x if count <= 4 else x + 4, y, _short(name), name, **turn))
        parts.append(_text(left - 6, top + middle + 4, _short(name), name, text_anchor="end"))
    totals = np.maximum(matrix.sum(1), 1)
    for row in range(count):
        for column in range(count):
            value, change = int(matrix[row, column]), int(matrix[row, column] - reference[row, column])
            share = value / totals[row]
            x, y = left + cell * column, top + cell * row
            ink = "#fff" if share > 0.6 else INK
            box = tag(
                "rect", x=x, y=y, width=cell - 1, height=cell - 1, fill=colour(index), fill_opacity=f"{share:.3f}"
            )
            frame = tag("rect", x=x, y=y, width=cell - 1, height=cell - 1, fill="none", stroke=RULE)
            title = tag("title", f"{classes[row]} predicted as {classes[column]}: {value} ({change:+d})")
            numbers = []
            if count <= NUMBERED_CLASSES:
                up = 2 if change else -4
                numbers.append(_text(x + cell / 2, y + cell / 2 - up, f"{value:,}", text_anchor="middle", fill=ink))
            if count <= NUMBERED_CLASSES and change:
                numbers.append(
                    _text(
                        x + cell / 2,
                        y + cell / 2 + 13,
                        f"({change:+d})",
                        text_anchor="middle",
                        fill=ink,
                        font_size=11,
                    )
                )
            parts.append(tag("g", title, box, frame, *numbers))
    return _svg(width, height, *parts)


def densities(density: Mapping[str, float], kept_layers: Sequence[int] | None = None) -> Markup:
    """What pruning has left of each matrix: layers in rows, their matrices in columns, shaded by density.

    Args:
        density: of each weight, from 0 to 1, by qualified name, as `bert.encoder.layer.0.output.dense.weight`. Weights
            outside of the layers have a row of their own.
        kept_layers: the layers that are left, where whole ones were pruned.
    """
    inside = {name: re.fullmatch(r"(.*?)\.(\d+)\.(.+)\.weight", name) for name in density}
    stacks = {found[1] for found in inside.values() if found}
    cells: dict[str, dict[str, float]] = {}
    for name, value in density.items():
        row, column, is_gone = name.removesuffix(".weight"), "", False
        if found := inside[name]:
            stack, layer, column = found.groups()
            row = layer if len(stacks) == 1 else f"{stack}.{layer}"  # an encoder's and a decoder's
            is_gone = kept_layers is not None and int(layer) not in kept_layers
        cells.setdefault(row, {})[column] = 0.0 if is_gone else value
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    cell, high = 54, 22
    left, top = 14 + 7 * max(map(len, cells)), 16 + 6 * max(map(len, columns))
    width, height = left + cell * len(columns) + 8, top + high * len(cells) + 6
    parts = []
    for number, column in enumerate(columns):
        x = left + cell * (number + 0.5) + 4
        parts.append(_text(x, top - 8, column, transform=f"rotate(-90 {x:.0f} {top - 8})"))
    for line, (row, values) in enumerate(cells.items()):
        y = top + high * line
        parts.append(_text(left - 8, y + 15, row, text_anchor="end"))
        for column, value in values.items():
            x = left + cell * columns.index(column)
            where = {"x": x, "y": y, "width": cell - 2, "height": high - 2}
            ink = "#fff" if value > 0.6 else INK
            parts.append(
                tag(
                    "g",
                    tag("title", f"{row} {column}: {100 * value:.2f} % of its weights are left"),
                    tag("rect", **where, fill=colour(0), fill_opacity=f"{value:.3f}", stroke=RULE),
                    _text(x + cell / 2 - 1, y + 15, f"{100 * value:.3g} %", text_anchor="middle", fill=ink),
                )
            )
    return _svg(width, height, *parts)


def write_picture(picture: Markup, file: Path) -> None:
    """Writes a picture as a file that browsers and Markdown show."""
    attributes = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
    file.write_text(picture.replace("<svg ", f"<svg {attributes} ", 1) + "\n", encoding="utf-8")


def _svg(width: int, height: int, *parts: Markup) -> Markup:
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img")


def _text(x: float, y: float, text: str, title: str | None = None, **attributes: str | float) -> Markup:
    shown = join(text, tag("title", title)) if title is not None and title != text else text
    return tag("text", shown, x=float(x), y=float(y), **(TEXT_STYLE | attributes))


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _padded(values: Sequence[float], share: float, least: float) -> tuple[float, float]:
    """A range around the values that is never so narrow that noise looks like a difference."""
    low, high = min(values), max(values)
    room = max(share * (high - low), (least - (high - low)) / 2, least / 4)
    return low - room, high + room


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between the two, some `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [tick for tick in fine if low <= tick <= high] or _ticks(low, high, 3)


def _horizontal_grid(ticks: Sequence[float], up: Callable[[float], float], left: float, right: float) -> list[Markup]:
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]))) if len(ticks) > 1 else 3
    return [
        part
        for tick in ticks
        for part in (
            tag("line", x1=left, x2=right, y1=up(tick), y2=up(tick), stroke=RULE),
            _text(left - 6, up(tick) + 4, f"{tick:.{digits}f}", text_anchor="end"),
        )
    ]


def _vertical_ticks(ticks: Sequence[float], across: Callable[[float], float], floor: float, top: float) -> list[Markup]:
    return [
        part
        for tick in ticks
        for part in (
            tag("line", x1=across(tick), x2=across(tick), y1=top, y2=floor, stroke=RULE),
            _text(across(tick), floor + 16, f"{tick:.4g}", text_anchor="middle"),
        )
    ]
