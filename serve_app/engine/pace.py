"""Whether a request will be done before its deadline, by what others have lately taken.

Costs are measured (`work.Meter`) with a short memory, as what matters is how fast the engine is
now: other programs may have its processors. That cuts both ways. A bad minute ends, so a bad
estimate must not refuse those who can wait for its end, nor refuse everybody and so never be
corrected:

- nobody is refused who begins at once, and the others only while steps are being made;
- what is slow for want of processors is taken to be so for `_BAD_TIME_S` at most;
- costs are forgotten when the engine has had nothing to do for a while.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from serve_app.engine.queue import Entry
from serve_app.engine.work import Meter, Tally

_HALF_LIFE_S = 15.0  # of busy time, of what was measured
_READ_EVERY_S = 0.5
_STALE_S = 5.0  # without a step, after which nothing measured says anything of now
_BAD_TIME_S = 20.0
# Who is expected later than at this part of its time is refused: half of those expected just in
# time would be late, after they have cost all that they cost.
_MARGIN = 0.75
# A batch is only so full that those in it need no more than this part of their time. The few rows
# less cost little. Below the other part by as much as may be waited for: who has waited long would
# keep the batch at few rows, and so the others waiting.
_FULL = 0.7


class Pace:
    """How long requests will take, from now to their end. Not to be used by threads at once.

    Args:
        slots: rows of a full batch.
    """

    def __init__(self, slots: int) -> None:
        self._slots = max(slots, 1)
        self._meter = Meter(self._slots, _HALF_LIFE_S)
        self._read_at: float | None = None

    def stepped(self, tally: Tally, now: float) -> None:
        """A step was made; `tally` is of all until now."""
        if self._read_at is not None and now - self._read_at < _READ_EVERY_S:
            return
        if self._read_at is None or now - self._read_at > _STALE_S:
            self._meter = Meter(self._slots, _HALF_LIFE_S)
        self._meter.read(tally)
        self._read_at = now

    @property
    def step(self) -> tuple[float, float]:
        """Seconds of any step, and more of them for each row; zeros: nobody knows."""
        return self._meter.step

    def step_s(self, entry: Entry, now: float) -> float:
        """How long a step may take for `entry` to end in time. Infinite: as long as it likes."""
        deadline = entry.request.deadline
        if deadline is None or not self._known(now):
            return math.inf
        # While some are encoded, there are no steps.
        left = _FULL * (deadline - now) * (1 - self._meter.encoding)
        return left / self._steps(entry)

    def rows(self, steps_s: Iterable[float], used: int) -> int:
        """Rows that the batch may have, of which so many are used, for steps to take no longer.

        A batch so full that nobody in it ends in time does nothing but cost. Those who will be late
        whoever else comes, or alone, count for nothing.
        """
        fixed_s, more_s = self._meter.step
        least_s = fixed_s + max(used, 1) * more_s
        tightest = min((one for one in steps_s if one >= least_s), default=math.inf)
        if more_s <= 0 or tightest == math.inf:
            return self._slots
        return max(min(int((tightest - fixed_s) / more_s), self._slots), used, 1)

    def must_wait(self, step_s: float, rows: int, beams: int) -> bool:
        """Whether one with time for such steps would be late in a batch of so many rows.

        Not where it would be late alone: waiting does not help it.
        """
        fixed_s, more_s = self._meter.step
        return fixed_s + beams * more_s <= step_s < fixed_s + rows * more_s

    def expected_s(
        self, entry: Entry, running: Sequence[Entry], ahead: Iterable[Entry], now: float
    ) -> float | None:
        """Seconds until the last token of `entry`, if those `ahead` of it all come first.

        Rows are taken in order, each by whoever is next when it becomes free, which is at its
        document's deadline at the latest. Once it has begun, `entry` is taken to run in a batch as
        full as its own time allows: to let in who would be in time only in a batch of few rows,
        after a long wait, keeps the batch at few rows, and the wait long.

        Returns:
            None: it begins at once, or nobody knows.
        """
        if not self._known(now):
            return None
        used = sum(one.rows for one in running)
        waiting = [*ahead, entry]
        most = self.rows((self.step_s(one, now) for one in (*running, *waiting)), used)
        if used + sum(one.rows for one in waiting) <= most:
            return None
        fixed_s, more_s = self._meter.step
        step_s = max(fixed_s + most * more_s, 1e-9)
        free_at = [
            min(self._steps(one), self._left_s(one, now) / step_s)
            for one in running
            for _ in range(one.rows)
        ]
        free_at += [0.0] * (most - used)
        heapq.heapify(free_at)
        begins = 0.0
        for one in waiting:
            taken = min(one.rows, len(free_at))
            begins = [heapq.heappop(free_at) for _ in range(taken)][-1]
            for _ in range(taken):
                heapq.heappush(free_at, begins + self._steps(one))
        full = self.rows([self.step_s(entry, now)], used)
        stepping_s = begins * step_s
        stepping_s += self._steps(entry) * (fixed_s + full * more_s)
        seconds = stepping_s / (1 - self._meter.encoding)
        return min(seconds, _BAD_TIME_S + seconds * self._meter.computing)

    def late_s(
        self, entry: Entry, running: Sequence[Entry], ahead: Iterable[Entry], now: float
    ) -> float | None:
        """By how many seconds the entry's deadline is too early; None: it is not, or who knows."""
        if entry.request.deadline is None:
            return None
        expected = self.expected_s(entry, running, ahead, now)
        if expected is None:
            return None
        late = expected - _MARGIN * (entry.request.deadline - now)
        return late if late > 0 else None

    def _left_s(self, entry: Entry, now: float) -> float:
        """Seconds of steps until the entry's deadline."""
        deadline = entry.request.deadline
        if deadline is None:
            return math.inf
        return max(deadline - now, 0.0) * (1 - self._meter.encoding)

    def _known(self, now: float) -> bool:
        """Whether what was measured says something of now."""
        fresh = self._read_at is not None and now - self._read_at <= _STALE_S
        return fresh and self._meter.measured

    def _steps(self, entry: Entry) -> float:
        """Steps until it will be done, if it becomes as long as others did."""
        settings = entry.request.settings
        per_step = self._meter.made_per_step
        mean = self._meter.steps
        most = settings.max_new_tokens / per_step
        least = settings.min_new_tokens / per_step
        total = most if mean is None else max(min(most, mean), least)
        return max(total - entry.made / per_step, 1.0)
