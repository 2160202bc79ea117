"""What is recorded and reported of a simulated service, and what Serve's controller knows by it.

The handle records its queue and each replica's requests; where scaling is by tokens, replicas
record their work. All do so at the same moments, and report at the same: in reality each has a
clock of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from serve_app.scaling import STALE_S, Point, Seen, TokenPolicy, summed
from serve_app.tuning import kernel, meter
from serve_app.tuning.arrivals import Floats
from serve_app.tuning.kernel import Cluster
from serve_app.tuning.model import Scaling
from serve_app.tuning.ray_policy import RECORD_FACTOR, Policy, Signal, series, signal


class Reports:
    """Records, reports, and the policy that decides by them.

    Args:
        room: numbers that a replica may have.
        slots: rows of an engine's full batch.
    """

    def __init__(self, scaling: Scaling, room: int, slots: int) -> None:
        self._scaling = scaling
        self._slots = slots
        self.record_s = min(scaling.look_back_period_s * RECORD_FACTOR, 10.0)
        self.load = Signal(0.0)  # requests in the queue and at replicas
        self._points: list[tuple[float, Floats]] = []  # first the queue, then each replica
        self._reported: list[tuple[float, Floats]] = []
        self._works: list[tuple[float, Floats]] = []  # of each replica, its work
        self._reported_works: list[tuple[float, Floats]] = []
        self._queued = Signal(0.0)
        self._seen: Seen | None = None
        self._tokens: TokenPolicy | None = None
        self._meters: meter.Meters | None = None
        if scaling.signal == "tokens":
            self._tokens = TokenPolicy(scaling.target_drain_s)
            self._meters = meter.meters(room)

    def policy(self) -> Policy:
        """The policy of the settings, told what the controller knows."""
        tokens = self._tokens
        if tokens is None:
            return Policy(self._scaling)
        # What `TokenPolicy.__call__` does, but that reports are read once and not at each pass.
        return Policy(
            self._scaling,
            lambda ctx: tokens.decide(ctx, self._seen),
            lambda now: {"total_queued_requests": self._queued.at(now)},
        )

    def begin(self, replica: int) -> None:
        """A replica is new: what another of its number recorded was not of it."""
        for _, row in [*self._points, *self._reported]:
            row[replica + 1] = np.nan
        if self._meters is not None:
            meter.begin(self._meters, replica)
            for _, rows in [*self._works, *self._reported_works]:
                rows[replica] = np.nan

    def record(self, now: float, cluster: Cluster, running: Sequence[int]) -> None:
        """All record what there is."""
        self._points.append((now, _ongoing(cluster, running)))
        if self._meters is not None:
            among = np.array(running, dtype=np.int64)
            said = np.empty((len(running), 4))
            meter.report(cluster, self._meters, self._slots, among, now, said)
            row = np.full((len(cluster.state), 4), np.nan)
            row[among] = said
            self._works.append((now, row))
        self._prune(now)

    def push(self, now: float, cluster: Cluster, running: Sequence[int]) -> None:
        """All report their records of the look-back."""
        self._prune(now)
        self._reported = list(self._points)
        self._reported_works = list(self._works)
        # Who has no point yet is reported with one of this moment.
        known = self._points[-1][1] if self._points else _ongoing(cluster, []) * np.nan
        new = [one for one in running if np.isnan(known[one + 1])]
        if new or not self._points:
            row = _ongoing(cluster, new)
            if self._points:
                row[0] = np.nan
            self._reported.append((now, row))
        self.digest(now, running)

    def digest(self, now: float, running: Sequence[int]) -> None:
        """What the controller makes of the last report: replicas that do not run do not count."""
        if not self._reported:
            return
        columns = [0, *(one + 1 for one in running)]
        function = self._scaling.aggregation_function
        self.load = signal(*series(self._reported, columns), function)
        if self._tokens is not None:
            self._queued = signal(*series(self._reported, [0]), function)
            since = now - self._scaling.look_back_period_s - STALE_S
            self._seen = summed([self.points(one) for one in running], since)

    def points(self, replica: int) -> list[Point]:
        """What a replica last reported of its work, in order of time."""
        found = []
        for at, rows in self._reported_works:
            waiting, running, done, finished = rows[replica].tolist()
            if not math.isnan(waiting):
                found.append(Point(at, waiting + running, done, finished))
        return found

    def stale(self, now: float) -> float:
        """When reports of work are too old, if no others come."""
        last = self._reported_works[-1][0] if self._reported_works else math.inf
        return max(last + self._scaling.look_back_period_s + STALE_S, now)

    def _prune(self, now: float) -> None:
        begin = now - self._scaling.look_back_period_s
        self._points = [point for point in self._points if point[0] > begin]
        self._works = [point for point in self._works if point[0] > begin]


def _ongoing(cluster: Cluster, among: Sequence[int]) -> Floats:
    """Requests in the handle's queue and at each replica, NaN where there is none."""
    row = np.full(len(cluster.state) + 1, np.nan)
    row[0] = cluster.scalars[kernel.HANDLE_WAITING]
    row[[one + 1 for one in among]] = cluster.ongoing[list(among)]
    return row
