"""Scaling by work instead of by requests: a policy for Ray Serve's controller.

Each replica's engine tells how much work waits and runs, and how much it has done, in seconds of a
full batch (`engine/work.py`): tokens, weighed with what they were measured to cost. A replica does
one second of work in a second, so

    replicas = work that comes in a second + work in front of the replicas / target_drain_s

The first term holds what a steady load needs, however many replicas there are now: it does not
fall because replicas were added. The second has what has piled up done within `target_drain_s`,
and is the room that a steady load gets: where a request takes T seconds, replicas are busy
1 / (1 + T / target_drain_s) of the time. It corrects the first, too: were a replica slower than
measured, work would pile up until there are enough.

Delays, factors and bounds are Ray's. This module is imported by Serve's controller and pickled by
value: it needs nothing but Ray.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

logger = logging.getLogger("ray.serve")

PATH = "serve_app.scaling:TokenPolicy"
# What replicas report, as `engine.work.Work` has it.
SERIES = ("waiting_s", "running_s", "done_s", "finished")
REQUEST_S = "request_s"  # in the policy's state: work of a request
# Reports come every 10 s, with points as old as the look-back.
STALE_S = 30.0
_SPARE = 1.1  # a replica goes if the others could do this much more than there is


class Point(NamedTuple):
    """What a replica said of itself at a moment."""

    at: float
    backlog_s: float
    done_s: float
    finished: float


class Seen(NamedTuple):
    """What all replicas said: work per second, work in front of them, requests' mean work."""

    replicas: int
    rate: float
    backlog_s: float
    request_s: float | None


class TokenPolicy:
    """Ray Serve's `policy_function`, with `policy_kwargs` of the same names.

    Never raises. Where replicas report nothing, nothing that can be used, or nothing recent, it
    decides as Ray's own policy does, by `target_ongoing_requests`. Where fewer than half of them
    report (just after some came), no replica goes.

    Args:
        target_drain_s: seconds of work that a replica may have in front of it.
    """

    def __init__(self, target_drain_s: float = 2.0) -> None:
        self._target_drain_s = target_drain_s
        self._told = False

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, and the state to be given next time."""
        try:
            return self.decide(ctx, look(ctx))
        except Exception:
            if not self._told:
                logger.exception("TokenPolicy failed; Ray's own policy decides")
            self._told = True
        try:
            desired, _ = replica_queue_length_autoscaling_policy(ctx)
            return _usable(desired), {}
        except Exception:
            return float(ctx.target_num_replicas), {}

    def decide(self, ctx: AutoscalingContext, seen: Seen | None) -> tuple[float, dict[str, Any]]:
        """The decision where replicas said what was `seen`; None: nothing that is of use."""
        state = {REQUEST_S: known} if (known := _number(ctx.policy_state.get(REQUEST_S))) else {}
        if seen is None or not ctx.current_num_replicas:
            desired, _ = replica_queue_length_autoscaling_policy(ctx)
            return _usable(desired), state
        if seen.request_s is not None:
            state[REQUEST_S] = seen.request_s
        queued = _number(ctx.total_queued_requests) or 0.0
        backlog_s = seen.backlog_s + max(queued, 0.0) * state.get(REQUEST_S, 0.0)
        desired = seen.rate + backlog_s / self._target_drain_s
        if (_number(ctx.total_num_requests) or 0.0) > 0:
            desired = max(desired, 1e-3)  # whatever it is that they wait for: not to zero
        target = ctx.target_num_replicas
        if desired < target:
            partial = seen.replicas * 2 < ctx.current_num_replicas
            desired = float(target) if partial else min(desired * _SPARE, float(target))
        return _usable(desired), state


def look(ctx: AutoscalingContext) -> Seen | None:
    """What the replicas that run said last. None: nothing that is of use."""
    reported = [_points(ctx.raw_metrics or {}, replica) for replica in _replicas(ctx)]
    since = -math.inf
    if ctx.current_time is not None and ctx.config is not None:
        since = ctx.current_time - ctx.config.look_back_period_s - STALE_S
    return summed(reported, since)


def summed(reported: Iterable[Sequence[Point]], since: float = -math.inf) -> Seen | None:
    """What replicas said, in order of time each, without those whose last word is older."""
    fresh = [points for points in reported if points and points[-1].at >= since]
    if not fresh:
        return None
    # A replica that has just come took load from others: all from when the last of them came.
    begin = max((points[0].at for points in fresh if len(points) > 1), default=-math.inf)
    rate = backlog_s = done_s = finished = 0.0
    for points in fresh:
        within: Sequence[Point] = [point for point in points if point.at >= begin]
        if len(within) < 2:
            within = points
        backlog_s += sum(point.backlog_s for point in within) / len(within)
        first, last = within[0], within[-1]
        if last.at <= first.at:
            continue
        done = last.done_s - first.done_s
        rate += (done + last.backlog_s - first.backlog_s) / (last.at - first.at)
        done_s += done
        finished += last.finished - first.finished
    request_s = done_s / finished if finished >= 1 and done_s > 0 else None
    return Seen(len(fresh), max(rate, 0.0), backlog_s, request_s)


def _replicas(ctx: AutoscalingContext) -> Iterable[Any]:
    return ctx.running_replicas or ()


def _points(metrics: dict[str, Any], replica: Any) -> list[Point]:
    """A replica's points in order of time; none where anything is amiss."""
    series = [metrics.get(name, {}).get(replica) or () for name in SERIES]
    return list(_read(zip(*series, strict=False)))


def _read(rows: Iterable[tuple[Any, ...]]) -> Iterator[Point]:
    last = -math.inf
    for row in rows:
        values = [_number(one.value) for one in row]
        at = _number(row[0].timestamp)
        if at is None or at < last or any(value is None or value < 0 for value in values):
            continue
        last = at
        waiting, running, done, finished = (value or 0.0 for value in values)
        yield Point(at, waiting + running, done, finished)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _usable(desired: float) -> float:
    return max(float(desired), 0.0) if math.isfinite(desired) else 0.0
