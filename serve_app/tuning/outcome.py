"""A simulation's figures, as a record, as text and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from serve_app.tuning import kernel
from serve_app.tuning.simulate import Simulated, Timeline
from serve_app.tuning.sizes import Ints
from serve_app.usage.page import document, table_html
from serve_app.usage.svg import lines
from serve_app.usage.text import table_text
from serve_app.usage.views import Table

QUANTILES = (50, 95, 99)


def quantile(histogram: Ints, percent: float) -> float | None:
    """Seconds; exact to half a per cent, the half width of a bin."""
    total = int(histogram.sum())
    if not total:
        return None
    wanted = max(int(np.ceil(total * percent / 100)), 1)
    place = int(np.searchsorted(np.cumsum(histogram), wanted))
    return kernel.latency_of(place)


def reversals(timeline: Timeline) -> int:
    """How often the target turned: rose after it had fallen, or fell after it had risen."""
    steps = np.sign(np.diff(timeline.target))
    steps = steps[steps != 0]
    return int((steps[1:] != steps[:-1]).sum())


def figures(simulated: Simulated) -> dict[str, Any]:
    """All of it that is one number; seconds, hours, requests."""
    totals = simulated.counts.sum(axis=0)
    arrived, succeeded = int(totals[kernel.ARRIVED]), int(totals[kernel.SUCCEEDED])
    histogram = simulated.latencies.sum(axis=0)
    hours = simulated.duration_s / 3_600
    return {
        "seconds": simulated.duration_s,
        "requests": arrived,
        "succeeded": succeeded,
        "queue_full": int(totals[kernel.REJECTED]),
        "deadline": int(totals[kernel.LATE]),
        "attainment": int(totals[kernel.MET]) / arrived if arrived else None,
        "latency_mean_s": simulated.latency_s / succeeded if succeeded else None,
        **{f"latency_p{one}_s": quantile(histogram, one) for one in QUANTILES},
        "replica_hours": simulated.replica_s / 3_600,
        "node_hours": simulated.node_s / 3_600,
        "replicas_mean": simulated.replica_s / 3_600 / hours,
        "replicas_max": max(simulated.timeline.running),
        "reversals": reversals(simulated.timeline),
        "failures": simulated.failures,
    }


def record(simulated: Simulated, what: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: what was simulated, figures, timeline."""
    line = simulated.timeline
    return {
        **what,
        "figures": figures(simulated),
        "timeline": {
            "at_s": line.at,
            "target": line.target,
            "running": line.running,
            "nodes": line.nodes,
        },
    }


def text(simulated: Simulated, what: Sequence[str]) -> str:
    """What a terminal shows."""
    rows = figures(simulated)
    told = "".join(f"{line}\n" for line in what)
    return f"{told}\n{table_text(_table(rows))}"


def _table(rows: dict[str, Any]) -> Table:
    return Table("figures", list(rows), [tuple(rows.values())])


def page(simulated: Simulated, what: Sequence[str]) -> str:
    """All of it as HTML: replicas against load and latency."""
    bucket = simulated.bucket_s
    buckets = len(simulated.counts)
    at = [number * bucket for number in range(buckets)]
    hours = simulated.duration_s > 7_200
    unit, scale = ("h", 3_600.0) if hours else ("s", 1.0)
    across = [one / scale for one in at]
    per_s = simulated.counts / bucket
    rates = {
        "arrived": _floats(per_s[:, kernel.ARRIVED]),
        "succeeded": _floats(per_s[:, kernel.SUCCEEDED]),
        "failed": _floats(per_s[:, kernel.REJECTED] + per_s[:, kernel.LATE]),
    }
    latencies = {
        f"p{one}": [quantile(simulated.latencies[number], one) for number in range(buckets)]
        for one in (50, 99)
    }
    line = simulated.timeline
    replicas: dict[str, list[float | None]] = {
        "target": _floats(line.target),
        "running": _floats(line.running),
        "nodes": _floats(line.nodes),
    }
    rows = figures(simulated)
    pairs = Table("figures", ["figure", "value"], [(name, value) for name, value in rows.items()])
    parts = [
        "<h2>Requests a second</h2>",
        lines(across, rates, unit),
        "<h2>Replicas</h2>",
        lines([one / scale for one in line.at], replicas, unit, steps=True),
        "<h2>Latency, s, by the time of arrival</h2>",
        lines(across, latencies, unit),
        "<h2>Figures</h2>",
        table_html(pairs),
    ]
    return document("t5-serve: simulated scaling", list(what), parts)


def _floats(values: Any) -> list[float | None]:
    return [float(one) for one in values]
