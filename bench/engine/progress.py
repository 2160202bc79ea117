"""Running figures of a long measurement, on standard error."""

from __future__ import annotations

import sys
import time

from bench.engine.workloads import Work

_PERIOD_S = 5.0


class Progress:
    """Counts requests and tokens; says so every few seconds."""

    def __init__(self, label: str, requests: int) -> None:
        self._label = label
        self._all = requests
        self._requests = self._tokens = 0
        self._began = self._said = time.perf_counter()

    def done(self, *works: Work) -> None:
        """These requests are through."""
        self._requests += len(works)
        self._tokens += sum(work.tokens for work in works)
        now = time.perf_counter()
        if now - self._said >= _PERIOD_S:
            self._said = now
            speed = self._tokens / (now - self._began)
            say(f"  {self._label}: {self._requests}/{self._all} requests, {speed:.0f} tokens/s")


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
