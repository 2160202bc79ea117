"""Counting without cost: plain additions, handed to Ray once a second.

One `inc` of Ray's costs about 10 µs, as much as a decode step of a small model takes for a document
or two; an addition here costs 0.1 µs.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable

from ray.serve import metrics

from serve_app.metrics.series import Kind, Series

PERIOD_S = 1.0


class Exporter:
    """The series of one replica. Only `inc_now` may be called off the replica's event loop.

    What a replica has counted in its last second goes with it when it is killed.
    """

    def __init__(self, series: Iterable[Series]) -> None:
        self._labels = {one.name: one.labels for one in series}
        self._counters: dict[str, metrics.Counter] = {}
        self._gauges: dict[str, metrics.Gauge] = {}
        self._histograms: dict[str, metrics.Histogram] = {}
        for one in series:
            named = {"name": one.name, "description": one.text, "tag_keys": one.labels or None}
            match one.kind:
                case Kind.COUNTER:
                    self._counters[one.name] = metrics.Counter(**named)  # type: ignore[arg-type]
                case Kind.GAUGE:
                    self._gauges[one.name] = metrics.Gauge(**named)  # type: ignore[arg-type]
                case Kind.HISTOGRAM:
                    self._histograms[one.name] = metrics.Histogram(
                        boundaries=list(one.boundaries),
                        **named,  # type: ignore[arg-type]
                    )
        self._counted: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)

    def add(self, name: str, amount: float = 1, *labels: str) -> None:
        """Count. `labels` are the values of the series' labels, in their order."""
        self._counted[name, labels] += amount

    def inc_now(self, name: str, amount: float = 1) -> None:
        """Count from any thread; costs what Ray's counter does."""
        self._counters[name].inc(amount)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge, now."""
        self._gauges[name].set(value, tags=self._tags(name, labels))

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Put a value into a histogram, now. Ray refuses values that are not positive."""
        self._histograms[name].observe(max(value, 1e-3), tags=self._tags(name, labels))

    def flush(self) -> None:
        """Hand what has been counted to Ray."""
        counted, self._counted = self._counted, defaultdict(float)
        for (name, labels), amount in counted.items():
            if amount > 0:  # Ray's counters refuse an increment of zero
                self._counters[name].inc(amount, tags=self._tags(name, labels))

    async def run(self, refresh: Callable[[], None]) -> None:
        """Until cancelled: `refresh`, which sets gauges, then `flush`, once a second."""
        while True:
            refresh()
            self.flush()
            await asyncio.sleep(PERIOD_S)

    def _tags(self, name: str, labels: tuple[str, ...]) -> dict[str, str]:
        return dict(zip(self._labels[name], labels, strict=True))
