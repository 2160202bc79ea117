"""A bench's figures as text and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve_app.tuning.arrivals import Floats
from serve_app.tuning.measured import Measured, Spread
from serve_app.tuning.send import OK, UNFINISHED, Run
from serve_app.usage.page import document, table_html
from serve_app.usage.svg import columns, lines
from serve_app.usage.text import table_text
from serve_app.usage.views import Table

_BUCKETS = 60  # along a time axis


def text(measured: Measured, what: Sequence[str]) -> str:
    """What a terminal shows; `what` says what was sent to whom."""
    parts = ["".join(f"{line}\n" for line in what), table_text(latencies(measured))]
    parts += [f"{line}\n" for line in sentences(measured)]
    return "\n".join(parts[:2]) + "\n" + "".join(parts[2:])


def sentences(measured: Measured) -> list[str]:
    """The figures that are not latencies, a line each."""
    one = measured
    said = [
        f"sent {one.sent:,} requests in {one.seconds:,.1f} s: {one.sent_rate:,.2f} a second of "
        f"{one.planned_rate:,.2f} planned; {one.succeeded:,} succeeded",
    ]
    if one.attainment is not None:
        said.append(
            f"within {one.objective_s:g} s: {one.attainment:.2%} of what was due, "
            f"goodput {one.goodput:,.2f} requests a second"
        )
    said += [f"failed, {kind}: {count:,}" for kind, count in one.errors.items()]
    if one.unfinished:
        said.append(f"given up when the run was stopped: {one.unfinished:,}")
    said.append(f"the generator used {one.cpu:.0%} of a processor")
    if one.missed is not None:
        said.append(f"no claim to {one.planned_rate:,.2f} requests a second: {one.missed}")
    return said


def latencies(measured: Measured) -> Table:
    """Rows of milliseconds: successful requests, failed ones, the generator's own lag."""
    rows = [
        ("latency", measured.latency),
        ("latency, failed", measured.failed_latency),
        ("generator's lag", measured.lag),
    ]
    names = list(measured.latency.quantiles)
    shown = [(name, spread) for name, spread in rows if spread.count or name == "latency"]
    return Table(
        "latencies",
        ["ms", "requests", "mean", *names, "max"],
        [(name, spread.count, *_ms(spread)) for name, spread in shown],
    )


def _ms(spread: Spread) -> list[float | None]:
    values = [spread.mean, *spread.quantiles.values(), spread.max]
    return [None if value is None else round(value * 1e3, 2) for value in values]


def page(measured: Measured, run: Run, what: Sequence[str]) -> str:
    """The whole of it as HTML, with plots over the time at which requests were due."""
    end = max([measured.seconds, *(one.due for one in run.sent)])
    at = np.array([one.due for one in run.sent])
    bucket = np.minimum((at / end * _BUCKETS).astype(int), _BUCKETS - 1)
    latency = np.array([one.latency_s if one.kind == OK else np.nan for one in run.sent])
    width = end / _BUCKETS
    starts = [round(number * width, 2) for number in range(_BUCKETS)]

    def per_bucket(chosen: list[bool]) -> list[float]:
        counted = np.bincount(bucket[np.array(chosen, dtype=bool)], minlength=_BUCKETS)
        return [float(one) / width for one in counted]

    quantiles = {
        f"p{one}": [_quantile(latency[bucket == number], one) for number in range(_BUCKETS)]
        for one in (50, 99)
    }
    rates = {
        "succeeded": per_bucket([one.kind == OK for one in run.sent]),
        "failed": per_bucket([one.kind not in (OK, UNFINISHED) for one in run.sent]),
        "given up": per_bucket([one.kind == UNFINISHED for one in run.sent]),
    }
    good = np.sort(latency[~np.isnan(latency)])
    shares = np.linspace(0, 100, 101)
    curve = [float(np.percentile(good, one)) * 1e3 for one in shares] if good.size else []
    parts = [
        "<h2>Figures</h2>",
        table_html(latencies(measured)),
        "<h2>Requests a second, by the time they were due</h2>",
        columns([f"{one:g} s" for one in starts], rates, stacked=True),
        "<h2>Latency, ms, by the time requests were due</h2>",
        lines(starts, quantiles, "s"),
        "<h2>Latency, ms, of the fastest share of requests</h2>",
        lines([float(one) for one in shares] if curve else [], {"ms": curve}, "%"),
    ]
    return document("t5-serve: bench", [*what, *sentences(measured)], parts)


def _quantile(values: Floats, percent: float) -> float | None:
    values = values[~np.isnan(values)]
    return float(np.percentile(values, percent)) * 1e3 if values.size else None
