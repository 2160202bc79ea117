"""Small charts as SVG text: columns and lines over time, bars per name, a heat map."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

from serve_app.usage.text import shown

COLOURS = 7  # classes s0 to s6 of the page
_WIDTH, _HEIGHT = 720, 220
_LEFT, _BOTTOM, _TOP = 56, 24, 8
_LABELS = 4  # along the axis at most: some are as long as a time and a route


def columns(labels: Sequence[str], series: Mapping[str, Sequence[float]], stacked: bool) -> str:
    """A column per label: the series on top of each other, or side by side."""
    highest = sum if stacked else max
    top = max([*(highest(values) for values in zip(*series.values(), strict=True)), 1e-9])
    step = (_WIDTH - _LEFT) / max(len(labels), 1)
    height = _HEIGHT - _BOTTOM - _TOP
    parts = [_axis(top, height)]
    for at, label in enumerate(labels):
        x, floor = _LEFT + at * step, float(_TOP + height)
        width = step * 0.84 if stacked else step * 0.84 / len(series)
        for number, (name, values) in enumerate(series.items()):
            tall = values[at] / top * height
            title = f"{label}: {shown(values[at])} {name}"
            left = x if stacked else x + number * width
            parts.append(_rect(left, floor - tall, width, tall, f"s{number % COLOURS}", title))
            floor -= tall if stacked else 0
        if at % (len(labels) // _LABELS + 1) == 0:
            parts.append(_text(x, _HEIGHT - 6, label, "start"))
    return _svg(_HEIGHT, parts) + _legend(list(series))


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    unit: str,
    steps: bool = False,
) -> str:
    """A line per series over `x`, which ascends and is told in `unit`. None leaves a gap.

    With `steps`, a value stays until the next one.
    """
    top = max([*(one for values in series.values() for one in values if one is not None), 1e-9])
    height = _HEIGHT - _BOTTOM - _TOP
    low, wide = (x[0], max(x[-1] - x[0], 1e-9)) if x else (0.0, 1.0)
    parts = [_axis(top, height)]
    for number, values in enumerate(series.values()):
        drawn: list[str] = []
        pen = "M"
        for at, value in zip(x, values, strict=True):
            if value is None:
                pen = "M"
                continue
            right = _LEFT + (at - low) / wide * (_WIDTH - _LEFT)
            down = _TOP + height * (1 - value / top)
            across = f"H{right:.1f}" if steps and pen == "L" else ""
            drawn.append(f"{across}{pen}{right:.1f} {down:.1f}")
            pen = "L"
        parts.append(f'<path class="s{number % COLOURS}" d="{"".join(drawn)}"/>')
    for share in range(_LABELS):
        at = low + wide * share / _LABELS
        label = f"{shown(round(at, 2))} {unit}"
        parts.append(_text(_LEFT + (_WIDTH - _LEFT) * share / _LABELS, _HEIGHT - 6, label, "start"))
    return _svg(_HEIGHT, parts) + _legend(list(series))


def scatter(
    series: Mapping[str, Sequence[tuple[float, float]]], joined: Collection[str], unit: str
) -> str:
    """Points, x from 0 in `unit`, y above 0 on a logarithmic scale; those of `joined` as a line.

    A point at 0 or below lies on the lower edge.
    """
    points = [point for values in series.values() for point in values]
    right = max([*(x for x, _ in points), 1e-9]) * 1.03
    highest = max([*(y for _, y in points), 1e-9])
    lowest = min([*(y for _, y in points if y > 0), highest / 10])
    top, bottom = math.ceil(math.log10(highest) - 1e-9), math.floor(math.log10(lowest))
    height = _HEIGHT - _BOTTOM - _TOP

    def place(x: float, y: float) -> tuple[float, float]:
        level = max(math.log10(y), bottom) if y > 0 else bottom
        share = (level - bottom) / max(top - bottom, 1)
        return _LEFT + x / right * (_WIDTH - _LEFT), _TOP + height * (1 - share)

    parts = []
    for level in range(bottom, max(top, bottom + 1) + 1):
        _, y = place(0, 10.0**level)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{10.0**level:g}", "end"))
    for number, (name, values) in enumerate(series.items()):
        kind = f"s{number % COLOURS}"
        placed = [place(*point) for point in values]
        if name in joined:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
            parts.append(f'<path class="{kind}" d="M{path}"/>' if placed else "")
        for (x, y), point in zip(placed, values, strict=True):
            title = f"{name}: {shown(float(point[0]))} {unit}, {shown(float(point[1]))}"
            round_ = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            parts.append(f"{round_}<title>{escape(title)}</title></circle>")
    for share in range(_LABELS):
        label = f"{shown(round(right * share / _LABELS, 2))} {unit}"
        parts.append(_text(_LEFT + (_WIDTH - _LEFT) * share / _LABELS, _HEIGHT - 6, label, "start"))
    return _svg(_HEIGHT, parts) + _legend(list(series))


def bars(values: Mapping[str, float], unit: str) -> str:
    """A horizontal bar per name."""
    top = max([*values.values(), 1e-9])
    parts = []
    for at, (name, value) in enumerate(values.items()):
        y, long = at * 22, value / top * (_WIDTH - 300)
        parts.append(_text(180, y + 14, name[:26], "end"))
        parts.append(_rect(188, y + 3, long, 15, "s0", f"{name}: {shown(value)} {unit}"))
        parts.append(_text(194 + long, y + 14, f"{shown(value)} {unit}", "start"))
    return _svg(22 * len(values) + 4, parts)


def heat(rows: Sequence[str], width: int, values: Mapping[tuple[int, int], float]) -> str:
    """A cell for each row and each of `width` columns, the darker the more. Missing cells are 0."""
    top = max([*values.values(), 1e-9])
    cell = (_WIDTH - _LEFT) / width
    parts = [_text(_LEFT + at * cell, 12, str(at), "start") for at in range(0, width, 3)]
    for row, name in enumerate(rows):
        y = 18 + row * 22
        parts.append(_text(_LEFT - 6, y + 14, name, "end"))
        for at in range(width):
            value = values.get((row, at), 0)
            title = f"{name} {at}:00: {shown(value)}"
            opacity = f' fill-opacity="{0.06 + 0.94 * value / top:.3f}"'
            parts.append(_rect(_LEFT + at * cell, y, cell - 2, 20, "s0", title, opacity))
    return _svg(18 + 22 * len(rows), parts)


def _svg(height: float, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img">{"".join(parts)}</svg>'


def _rect(
    x: float, y: float, width: float, height: float, kind: str, title: str, more: str = ""
) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        f"{more}><title>{escape(title)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(shown(text))}</text>'


def _axis(top: float, height: float) -> str:
    lines = []
    for share in (0, 0.5, 1):
        y = _TOP + height * (1 - share)
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(_text(_LEFT - 6, y + 4, shown(round(top * share, 2)), "end"))
    return "".join(lines)


def _legend(names: list[str]) -> str:
    items = (
        f'<span><i class="s{at % COLOURS}"></i>{escape(shown(name))}</span>'
        for at, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'
