"""Who may begin: taken from the queue in turn, and not all of the batch for one share."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from serve_app.engine.pace import Pace
from serve_app.engine.queue import Entry, FairQueue
from serve_app.engine.shares import TimeShares

_RECENT_S = 10.0
_PART = 2  # with others there, a share may have one in so many rows, and of what is encoded


class Turns:
    """Takes those who may begin from a queue.

    While others have begun something within `_RECENT_S`, no share gets more than half of the rows
    and of the tokens encoded between two steps: whoever comes next finds a row, and steps that do
    not take as long as those of a full batch. A share alone gets all.

    Args:
        rows: of the batch.
        tokens: most padded tokens encoded between two steps.
        time: what shares have had, where that counts: who is ahead of another that is there gets
            nothing encoded, and the others one document each between two steps.
    """

    def __init__(self, rows: int, tokens: int, time: TimeShares | None = None) -> None:
        self._rows = rows
        self._tokens = tokens
        self._time = time
        self._seen: deque[tuple[str, float]] = deque(maxlen=2)  # two shares, the last one last

    def pull(
        self,
        queue: FairQueue,
        running: Iterable[Entry],
        pace: Pace,
        now: float,
        most_rows: int | None = None,
    ) -> list[Entry]:
        """Take, in turn, what fits into free rows and the encoder's budget.

        And no more than lets all of them still end in time, as `pace` has it, nor than `most_rows`,
        where memory was short.
        """
        used = Counter[str]()
        steps_s: list[float] = []  # how long a step may take
        for one in running:
            used[one.request.share] += one.rows
            steps_s.append(pace.step_s(one, now))
        rows, longest = used.total(), 0
        pulled: list[Entry] = []
        pulled_of = Counter[str]()
        held: set[str] = set()  # shares that may not have more now
        while (entry := queue.peek(held)) is not None:
            share, beams = entry.request.share, entry.rows
            padded = max(longest, entry.tokens)
            part = _PART if self._others(share, now) else 1
            crowded = used[share] and (used[share] + beams) * part > self._rows
            costly = pulled_of[share] and padded * (pulled_of[share] + 1) * part > self._tokens
            if crowded or costly or self._ahead(share, used, pulled_of, pace, now):
                held.add(share)
                continue
            step_s = pace.step_s(entry, now)
            steps_s.append(step_s)
            # More beams than rows, or more tokens than the budget: alone, it may all the same.
            most = min(most_rows or self._rows, pace.rows(steps_s, rows))
            if rows and (rows + beams > most or pace.must_wait(step_s, rows + beams, beams)):
                break
            if pulled and padded * (len(pulled) + 1) > self._tokens:
                break
            pulled.append(queue.pop(held))
            self._saw(share, now)
            rows, longest = rows + beams, padded
            used[share] += beams
            pulled_of[share] += 1
        return pulled

    def _saw(self, share: str, now: float) -> None:
        if self._seen and self._seen[-1][0] == share:
            self._seen.pop()
        self._seen.append((share, now))

    def _ahead(
        self, share: str, used: Counter[str], pulled: Counter[str], pace: Pace, now: float
    ) -> bool:
        """Whether a share must let the others catch up, or whoever of them comes next."""
        if self._time is None or not used[share]:
            return False
        there = {one: rows for one, rows in used.items() if rows}
        if pulled[share] and (len(there) > 1 or self._others(share, now)):
            return True
        return len(there) > 1 and self._time.ahead(share, there, pace.step)

    def _others(self, share: str, now: float) -> bool:
        """Whether another share has been there lately."""
        return any(other != share and now - at <= _RECENT_S for other, at in self._seen)
