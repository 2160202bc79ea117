"""A load, replicas and Ray Serve's autoscaling on virtual time.

`kernel.py` moves requests between the moments at which something is seen or changed from outside;
those are here: loads are recorded and reported (`reports.py`), the controller decides, nodes and
replicas come and go. What is simplified: one handle stands for all (each has clocks of its own in
reality), the control loop takes no time, and a replica that drains is never killed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from serve_app.tuning import kernel
from serve_app.tuning.arrivals import Floats
from serve_app.tuning.model import Platform, Scaling, ServiceModel
from serve_app.tuning.ray_policy import Policy, next_change
from serve_app.tuning.reports import Reports
from serve_app.tuning.sizes import Ints

Block = tuple[Floats, Ints, Ints, Ints]  # arrivals, s; input tokens; decode steps; rows
_RETRY_S = 1.0  # where more replicas drain than there is room for


@dataclass
class Timeline:
    """Replicas over time: each entry holds from its moment until the next. Seconds."""

    at: list[float] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)

    def add(self, at: float, target: int, running: int, nodes: int) -> None:
        """Append a moment, or put it in the place of the same one."""
        if self.at and self.at[-1] == at:
            self.target[-1], self.running[-1], self.nodes[-1] = target, running, nodes
            return
        self.at.append(at)
        self.target.append(target)
        self.running.append(running)
        self.nodes.append(nodes)


@dataclass(frozen=True)
class Simulated:
    """What came of it.

    Attributes:
        counts: per time bucket of `bucket_s` seconds, by arrival: `kernel.ARRIVED` and following.
        latencies: per time bucket, a histogram (`kernel.latency_of`).
        latency_s, wait_s: summed over successful requests; over those that began.
        replica_s, node_s: seconds for which replicas and nodes were there.
    """

    timeline: Timeline
    duration_s: float
    bucket_s: float
    counts: Ints
    latencies: Ints
    latency_s: float
    wait_s: float
    replica_s: float
    node_s: float
    failures: int


class Simulation:
    """One run.

    Args:
        blocks: the load, in order of arrival.
        duration_s: of the load; requests in flight then are let finish, unscaled.
        policy: default: that of the settings, Ray's own or `scaling.TokenPolicy`.
    """

    def __init__(
        self,
        blocks: Iterator[Block],
        duration_s: float,
        model: ServiceModel,
        scaling: Scaling,
        platform: Platform,
        *,
        objective_s: float = 2.0,
        seed: int = 1,
        buckets: int = 240,
        policy: Policy | None = None,
    ) -> None:
        self._blocks = blocks
        self._block: Block | None = next(blocks, None)
        self._index = 0
        self._end = duration_s
        self._scaling = scaling
        self._platform = platform
        self._rng = np.random.default_rng([seed, 2])
        room = 2 * scaling.max_replicas + 16
        self._reports = Reports(scaling, room, model.rows)
        self._record_at = math.inf
        self._policy = policy or self._reports.policy()
        self._scales = policy is not None or scaling.min_replicas < scaling.max_replicas
        self._bucket_s = duration_s / buckets
        self._rules = _rules(model, platform, objective_s, self._bucket_s)
        self._cluster = kernel.cluster(room, model.rows, buckets, 4_096, seed)
        self._events: list[tuple[float, int, str, tuple[int, ...]]] = []
        self._order = count()
        self._target = scaling.first_replicas
        self._running: list[int] = []  # replicas, oldest first
        # By number of the start, oldest first: since when it has a node, None: not yet.
        self._starting: dict[int, float | None] = {}
        self._starts = count()
        self._draining: list[int] = []
        self._lives: dict[int, tuple[int, float]] = {}  # of each replica: its start, and when
        self._idle: list[float] = []  # since when nodes have no replica
        self._nodes = 0
        self._replica_s = self._node_s = self._node_at = 0.0
        self._failures = 0
        self.timeline = Timeline()

    def run(self) -> Simulated:
        """Run it to its end."""
        platform = self._platform
        for _ in range(self._target):
            start = next(self._starts)
            self._starting[start] = 0.0
            self._set_nodes(0.0, self._nodes + 1)
            self._ready(0.0, start)
        while self._nodes < platform.min_nodes:
            self._set_nodes(0.0, self._nodes + 1)
            self._idle.append(0.0)
        self._note(0.0)
        record_at = self._rng.uniform(0, self._reports.record_s)
        push_at = self._rng.uniform(0, platform.push_interval_s)
        if self._scales and self._policy.looks:
            self._record_at = record_at
            self._at(push_at, "push")
        tick = 0
        period = platform.control_period_s
        while True:
            now = min(self._events[0][0], self._end) if self._events else self._end
            # A pass at the very moment of an event comes after it.
            last = math.ceil(now / period - 1e-9) - 1
            load, current = self._reports.load.at, len(self._running)
            if not self._scales:
                last = tick - 1
            changed = next_change(self._policy, load, tick, last, period, current, self._target)
            if changed is not None:
                tick, target = changed
                at = tick * period
                tick += 1
                self._advance(at)
                self._scale(at, target)
                continue
            tick = max(tick, last + 1)
            self._advance(now)
            if now >= self._end:
                break
            at, _, kind, about = heapq.heappop(self._events)
            getattr(self, f"_{kind}")(at, *about)
        return self._finish()

    def _finish(self) -> Simulated:
        self._advance(math.inf)
        for replica, (_, began) in self._lives.items():
            stopped = self._cluster.stopped[replica] if replica in self._draining else self._end
            self._replica_s += min(float(stopped), self._end) - began
        for since in self._starting.values():
            self._replica_s += 0.0 if since is None else self._end - since
        self._set_nodes(self._end, self._nodes)
        self._note(self._end)
        return Simulated(
            self.timeline,
            self._end,
            self._bucket_s,
            self._cluster.counts,
            self._cluster.latencies,
            float(self._cluster.sums[0]),
            float(self._cluster.sums[1]),
            self._replica_s,
            self._node_s,
            self._failures,
        )

    def _advance(self, until: float) -> None:
        """Move requests up to then, and record on the way: no decision hangs on a record alone."""
        while self._record_at <= min(until, self._end):
            self._move(self._record_at)
            self._reports.record(self._record_at, self._cluster, self._running)
            self._record_at += self._reports.record_s
        self._move(until)

    def _move(self, until: float) -> None:
        while True:
            block = self._block or (np.empty(0), *(np.empty(0, dtype=np.int64),) * 3)
            ends = block[0][-1] if len(block[0]) else math.inf
            step = min(until, float(ends))
            index = kernel.advance(self._cluster, self._rules, *block, self._index, step)
            if index < 0:
                self._cluster = kernel.grown(self._cluster)
                self._index = -index - 1
                continue
            self._index = index
            if self._block is None or index < len(block[0]):
                if step >= until:
                    return
                continue
            self._block, self._index = next(self._blocks, None), 0

    def _at(self, at: float, kind: str, *about: int) -> None:
        heapq.heappush(self._events, (at, next(self._order), kind, about))

    # Reports

    def _push(self, now: float) -> None:
        self._reports.push(now, self._cluster, self._running)
        following = now + self._platform.push_interval_s
        self._at(following, "push")
        if self._scaling.signal == "tokens" and (stale := self._reports.stale(now)) < following:
            self._at(math.nextafter(stale, math.inf), "digest")

    def _digest(self, now: float) -> None:
        self._reports.digest(now, self._running)

    # Replicas and nodes.

    def _scale(self, now: float, target: int) -> None:
        more = target - len(self._running) - len(self._starting)
        self._target = target
        for _ in range(more):
            self._begin(now)
        for _ in range(-more):
            if self._starting:
                # The newest first. A node that is on its way comes all the same.
                _, began = self._starting.popitem()
                if began is not None:
                    self._replica_s += now - began
                    self._leave_node(now)
                continue
            replica = self._running.pop()
            kernel.stop(self._cluster, replica, now)
            self._draining.append(replica)
            self._drained(now, replica)
        if more < 0:
            self._digest(now)
        self._note(now)

    def _begin(self, now: float, on_node: bool = False) -> None:
        """Start a replica, on a node that is free or on a new one."""
        start = next(self._starts)
        if self._idle and not on_node:
            self._idle.pop()
            on_node = True
        self._starting[start] = now if on_node else None
        if on_node:
            self._at(now + self._platform.cold_start_s, "ready", start)
        else:
            self._at(now + self._platform.node_s, "node", start)

    def _node(self, now: float, start: int) -> None:
        self._set_nodes(now, self._nodes + 1)
        if start in self._starting:
            self._starting[start] = now
            self._at(now + self._platform.cold_start_s, "ready", start)
        else:
            self._leave_node(now)
        self._note(now)

    def _ready(self, now: float, start: int) -> None:
        if start not in self._starting:
            return
        free = np.flatnonzero(self._cluster.state == kernel.OFF)
        if not free.size:
            self._at(now + _RETRY_S, "ready", start)
            return
        replica = int(free[0])
        began = self._starting.pop(start)
        assert began is not None
        self._lives[replica] = (start, began)
        self._running.append(replica)
        kernel.start(self._cluster, self._rules, replica, now)
        self._reports.begin(replica)
        if rate := self._platform.failures_per_replica_hour:
            self._at(now + self._rng.exponential(3_600 / rate), "fail", replica, start)
        self._digest(now)
        self._note(now)

    def _drained(self, now: float, replica: int) -> None:
        if self._cluster.state[replica] != kernel.OFF:
            self._at(now + _RETRY_S, "drained", replica)
            return
        stopped = float(self._cluster.stopped[replica])
        self._draining.remove(replica)
        self._replica_s += stopped - self._lives.pop(replica)[1]
        self._leave_node(stopped)

    def _fail(self, now: float, replica: int, start: int) -> None:
        if self._lives.get(replica, (-1, 0.0))[0] != start or replica not in self._running:
            return
        self._failures += 1
        self._running.remove(replica)
        kernel.kill(self._cluster, self._rules, replica, now)
        self._replica_s += now - self._lives.pop(replica)[1]
        self._begin(now, on_node=True)
        self._digest(now)
        self._note(now)

    def _leave_node(self, now: float) -> None:
        self._idle.append(now)
        self._at(now + self._platform.node_idle_s, "expire")

    def _expire(self, now: float) -> None:
        """Nodes without a replica for long enough go."""
        limit = now - self._platform.node_idle_s + 1e-9
        for since in [one for one in self._idle if one <= limit]:
            if self._nodes > self._platform.min_nodes:
                self._idle.remove(since)
                self._set_nodes(now, self._nodes - 1)
        self._note(now)

    def _set_nodes(self, now: float, nodes: int) -> None:
        self._node_s += self._nodes * (now - self._node_at)
        self._nodes, self._node_at = nodes, now

    def _note(self, now: float) -> None:
        self.timeline.add(now, self._target, len(self._running), self._nodes)


def _rules(
    model: ServiceModel, platform: Platform, objective_s: float, bucket_s: float
) -> kernel.Rules:
    return kernel.Rules(
        model.encode.call_s,
        model.encode.token_s,
        model.encode.squared_token_s,
        model.decode.step_s,
        model.decode.row_s,
        model.decode.source_token_s,
        model.overhead_s,
        model.rows,
        model.max_batch_tokens,
        model.max_waiting_requests,
        platform.max_ongoing_requests,
        platform.max_queued_requests,
        platform.deadline_s,
        objective_s,
        bucket_s,
    )
