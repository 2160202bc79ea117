"""A comparison of simulated and live as text, as a record and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from serve_app.tuning.compare import BUCKETS, Comparison
from serve_app.usage.page import document, table_html
from serve_app.usage.svg import lines
from serve_app.usage.text import table_text
from serve_app.usage.views import Table

_ROWS = (
    ("requests", "requests"),
    ("succeeded", "succeeded"),
    ("p50, s", "p50_s"),
    ("p95, s", "p95_s"),
    ("p99, s", "p99_s"),
    ("attainment", "attainment"),
    ("goodput, 1/s", "goodput"),
    ("mean wait, s", "wait_s"),
    ("mean in the engine, s", "engine_s"),
    ("mean outside both, s", "outside_s"),
    ("replicas, mean", "replicas_mean"),
    ("replicas, max", "replicas_max"),
)


def table(one: Comparison) -> Table:
    """Live and simulated side by side."""
    off = {
        "p50_s": _percent(one.p50_error),
        "p95_s": _percent(one.p95_error),
        "p99_s": _percent(one.p99_error),
        "attainment": f"{one.attainment_error:+.4f}",
    }
    rows = [
        (told, getattr(one.live, name), getattr(one.simulated, name), off.get(name, ""))
        for told, name in _ROWS
    ]
    return Table(one.name, [one.name, "live", "simulated", "difference"], rows)


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"


def sentences(one: Comparison) -> list[str]:
    """What the table does not say."""
    said = []
    if one.p95_range is not None:
        low, high = one.p95_range
        said.append(f"simulated p95 over the seeds: {low:.3f} to {high:.3f} s")
    if one.timeline_distance is None:
        said.append("replicas of the live side were not seen")
    else:
        said.append(f"replicas differ by {one.timeline_distance:.3f} on average over time")
    return said


def text(comparisons: Sequence[Comparison], what: Sequence[str]) -> str:
    """What a terminal shows."""
    parts = ["".join(f"{line}\n" for line in what)]
    parts += [
        table_text(table(one)) + "".join(f"{line}\n" for line in sentences(one))
        for one in comparisons
    ]
    return "\n".join(parts)


def page(comparisons: Sequence[Comparison], what: Sequence[str]) -> str:
    """All of it as HTML, both sides' replicas and latencies in the same plots."""
    parts = []
    for one in comparisons:
        width = one.seconds / BUCKETS
        starts = [number * width for number in range(BUCKETS)]
        parts += [
            f"<h2>Replicas, {one.name}</h2>",
            _replicas(one),
            f"<h2>Latency, s, by the time requests were due, {one.name}</h2>",
            lines(starts, one.latencies, "s"),
            f"<h2>Figures, {one.name}</h2>",
            table_html(table(one)),
            *(f'<p class="note">{line}</p>' for line in sentences(one)),
        ]
    return document("t5-serve: simulated and live", list(what), parts)


def _replicas(one: Comparison) -> str:
    sides = zip(("live", "simulated"), one.timelines, strict=True)
    known = {name: line for name, line in sides if line is not None}
    moments = np.unique(
        np.clip([0.0, one.seconds, *(at for line in known.values() for at in line.at)], 0,
                one.seconds)
    )  # fmt: skip
    drawn: dict[str, list[float | None]] = {
        name: [float(value) for value in line.over(moments)] for name, line in known.items()
    }
    return lines(moments.tolist(), drawn, "s", steps=True)


def record(comparisons: Sequence[Comparison], what: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: the first comparison's figures on top, the others under `others`."""
    first, *others = (one.record() for one in comparisons)
    return {**what, **first, "others": others}
