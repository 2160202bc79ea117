"""What a load met: percentiles, goodput, errors by kind, and what the generator did itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from serve_app.tuning.arrivals import Floats
from serve_app.tuning.send import OK, UNFINISHED, Run

QUANTILES = (50, 90, 95, 99, 99.9)
_WITHIN = 0.01  # of the requests may be missing or late before a rate is not claimed


@dataclass(frozen=True)
class Spread:
    """Seconds: mean, quantiles (`p50` to `p99.9`) and maximum; None of nothing."""

    count: int
    mean: float | None
    quantiles: dict[str, float | None]
    max: float | None

    @classmethod
    def of(cls, values: Floats) -> Spread:
        """Quantiles are values that occurred (inverted distribution function)."""
        names = [f"p{one:g}" for one in QUANTILES]
        if not values.size:
            return cls(0, None, dict.fromkeys(names), None)
        found = np.percentile(values, QUANTILES, method="inverted_cdf")
        quantiles: dict[str, float | None] = dict(zip(names, map(float, found), strict=True))
        return cls(int(values.size), float(values.mean()), quantiles, float(values.max()))


@dataclass(frozen=True)
class Measured:
    """The figures of a run. Seconds and requests per second.

    Attributes:
        planned, sent, dropped, unfinished, succeeded: requests. `planned` is up to the moment the
            run was stopped, `dropped` were due with too many in flight, `unfinished` given up.
        planned_rate, sent_rate: over the time in which requests were sent.
        latency: of successful requests, from the moment each was due.
        lag: of the generator: from the moment a request was due to the moment it was begun.
        goodput: successful requests within `objective_s` per second.
        attainment: their share of all that were due, but for the unfinished.
        cpu: of one processor, the share the generator used.
        missed: why the planned rate is not claimed, or None.
    """

    planned: int
    sent: int
    dropped: int
    unfinished: int
    succeeded: int
    errors: dict[str, int]
    seconds: float
    planned_rate: float
    sent_rate: float
    latency: Spread
    failed_latency: Spread
    lag: Spread
    objective_s: float
    goodput: float
    attainment: float | None
    cpu: float
    interrupted: bool
    missed: str | None

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def measure(run: Run, duration_s: float, objective_s: float, max_lag_s: float) -> Measured:
    """The figures of a run that was to last `duration_s`.

    A rate is claimed when 99 of 100 requests were begun within `max_lag_s` of their moment.
    """
    done = [one for one in run.sent if one.kind != UNFINISHED]
    good = np.array([one.latency_s for one in done if one.kind == OK])
    bad = np.array([one.latency_s for one in done if one.kind != OK])
    lag = np.array([one.began - one.due for one in run.sent])
    planned = len(run.sent) + run.dropped
    # The schedule's own time: sending that took longer than that was behind it.
    seconds = max(run.wall_s if run.stopped else duration_s, 1e-9)
    met = int((good <= objective_s).sum())
    due = planned - (len(run.sent) - len(done))
    return Measured(
        planned=planned,
        sent=len(run.sent),
        dropped=run.dropped,
        unfinished=len(run.sent) - len(done),
        succeeded=int(good.size),
        errors=dict(Counter(one.kind for one in done if one.kind != OK).most_common()),
        seconds=seconds,
        planned_rate=planned / seconds,
        sent_rate=len(run.sent) / max(seconds, run.wall_s),
        latency=Spread.of(good),
        failed_latency=Spread.of(bad),
        lag=Spread.of(lag),
        objective_s=objective_s,
        goodput=met / max(seconds, run.wall_s),
        attainment=met / due if due else None,
        cpu=run.cpu_s / max(run.wall_s, 1e-9),
        interrupted=run.stopped,
        missed=_missed(planned, run.dropped, lag, max_lag_s),
    )


def _missed(planned: int, dropped: int, lag: Floats, max_lag_s: float) -> str | None:
    late = int((lag > max_lag_s).sum())
    if not planned:
        return "nothing was sent"
    if late + dropped <= _WITHIN * planned:
        return None
    said = []
    if late:
        said.append(f"{late:,} of {planned:,} requests were begun over {max_lag_s:g} s late")
    if dropped:
        said.append(f"{dropped:,} were not sent, because too many were in flight")
    return " and ".join(said)
