"""The engine's time, in equal parts for the shares that have documents in the batch.

Turns at the queue are not enough on a CPU. A step takes as long as it has rows, and encoding one
part of a long document as long as fifty steps of a short text: whoever runs beside thirty such
parts is thirty times slower, however early it began. So shares are charged what they cost, and who
has had more than another waits, in its slots, until that has caught up: start-time fair queueing
(Goyal, Vin and Cheng 1996), as for the queue, by seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping


class TimeShares:
    """Seconds that each share has had. Those that have left the batch are forgotten."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}

    def running(self, shares: Collection[str]) -> None:
        """Whose documents are in the batch now. A new share begins where the least is."""
        least = min((had for share, had in self._had.items() if share in shares), default=0.0)
        self._had = {share: self._had.get(share, least) for share in shares}

    def first(self, share: str, others: Collection[str]) -> bool:
        """Whether a share has had less than each of the others, the new ones among them."""
        had = self._had.get(share)
        if had is None or not others:
            return True
        least = min(self._had.values())
        return all(had < self._had.get(other, least) for other in others)

    def stepping(self, rows: Mapping[str, int], step: tuple[float, float]) -> set[str]:
        """The shares whose documents take the next step.

        All that are not ahead of the last by more than one step of everybody: who is a little
        ahead costs the others less in their step than in one of its own.

        Args:
            rows: of each share.
            step: seconds of any step, and more of them for each row.
        """
        fixed_s, more_s = step
        most = min(self._had[share] for share in rows) + fixed_s + more_s * sum(rows.values())
        return {share for share in rows if self._had[share] <= most}

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

    def _charge(self, parts: Mapping[str, float], seconds: float) -> None:
        whole = sum(parts.values())
        for share, part in parts.items():
            if share in self._had and whole:
                self._had[share] += seconds * part / whole
