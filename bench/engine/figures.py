"""Arithmetic on what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Throughput:
    """So many requests, of so many useful output tokens together, in so many seconds."""

    requests: int
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Useful output tokens per second."""
        return self.tokens / self.seconds

    @property
    def requests_per_s(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation between ranks, as `numpy.percentile` has it."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def latencies(finished: Sequence[float], scheduled: Sequence[float]) -> list[float]:
    """Seconds from when each request was to arrive to when its answer was there.

    From the schedule, not from the sending: a sender that falls behind must not hide the wait
    ("coordinated omission").
    """
    return [end - start for end, start in zip(finished, scheduled, strict=True)]


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a ratio of ours to the best peer's, to the floor, or to the plan."""

    bound: float
    at_least: bool = False

    def met(self, ratio: float) -> bool:
        """Whether the ratio keeps the bound."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}×"


GOALS = {
    "offline greedy": Goal(5, at_least=True),
    "offline beams": Goal(4, at_least=True),
    "single": Goal(0.35),
    "copy": Goal(0.2),
    "p95 at 80 %": Goal(0.3),
    "step": Goal(1.5),
    "memory": Goal(1.3),
}
