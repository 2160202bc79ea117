"""The engine's time, in equal parts for the shares that have documents in the batch.

Turns at the queue are not enough on a CPU. A step takes as long as it has rows, and encoding one
part of a long document as long as fifty steps of a short text: whoever runs beside thirty such
parts is thirty times slower, however early it began. So shares are charged what they cost, and who
has had more than another waits, in its slots, until that has caught up: start-time fair queueing
(Goyal, Vin and Cheng 1996), as for the queue, by seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

_MOST = 1_024  # shares that have left and are remembered; with more, all of them are forgotten


class TimeShares:
    """Seconds that each share has had, on a clock that is that of the share furthest behind."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._now = 0.0

    def join(self, shares: Collection[str]) -> None:
        """These have documents in the batch now.

        A share that is new, or comes again, begins where the others were before the last unit of
        work: what that took, it had to wait.
        """
        for share in shares:
            self._had[share] = self._level(share)
        if shares:
            self._now = min(self._had[share] for share in shares)
        if len(self._had) > len(shares) + _MOST:
            self._had = {share: self._had[share] for share in shares}

    def ahead(self, share: str, rows: Mapping[str, int], step: tuple[float, float]) -> bool:
        """Whether a share has had more than the last of those there, by more than a step of all.

        By less, to wait for the others would cost it more than it costs them that it does not.

        Args:
            rows: of each share that is there.
            step: seconds of any step, and more of them for each row.
        """
        fixed_s, more_s = step
        least = min(map(self._level, rows), default=self._now)
        return self._level(share) > least + fixed_s + more_s * sum(rows.values())

    def stepped(self, rows: Mapping[str, int], step: tuple[float, float], seconds: float) -> None:
        """A step was made for so many rows of each share."""
        fixed_s, more_s = step
        if not fixed_s + more_s:
            more_s = 1.0  # nothing is known yet
        self._charge(
            {share: fixed_s / len(rows) + more_s * n for share, n in rows.items()}, seconds
        )

    def encoded(self, tokens: Mapping[str, int], seconds: float) -> None:
        """So many tokens of each share were encoded."""
        self._charge(tokens, seconds)

    def _level(self, share: str) -> float:
        return max(self._had.get(share, 0.0), self._now)

    def _charge(self, parts: Mapping[str, float], seconds: float) -> None:
        whole = sum(parts.values())
        for share, part in parts.items():
            if whole:
                self._had[share] += seconds * part / whole
