"""What a run has met so far, in one line."""

from __future__ import annotations

from itertools import islice

from serve_app.tuning.send import OK, UNFINISHED, Run

_RECENT = 500  # requests


def seen(run: Run) -> str:
    """Sent, in flight, failed; median and 99th percentile of the latest answers."""
    recent = list(islice(reversed(run.sent), _RECENT))
    done = [one for one in recent if one.kind != UNFINISHED]
    good = sorted(one.latency_s for one in done if one.kind == OK)
    said = f"{len(run.sent):,} sent, {run.in_flight:,} in flight"
    if failed := len(done) - len(good):
        said += f", {failed:,} of the last {len(done):,} failed"
    if good:
        p50, p99 = good[len(good) // 2], good[min(int(len(good) * 0.99), len(good) - 1)]
        said += f", p50 {p50 * 1e3:,.0f} ms, p99 {p99 * 1e3:,.0f} ms"
    if run.dropped:
        said += f", {run.dropped:,} not sent"
    return said
