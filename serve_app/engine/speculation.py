"""Lookup speculation: how many looked-up tokens to try, by what trying has cost and brought.

A greedy document's next tokens are often a span of its source. What follows the document's last few
tokens in the source is put behind its newest token as further rows of the step; the step then tells
of each whether it is what greedy search would have chosen, so the result is the same, sooner
(Saxena 2023, "Prompt Lookup Decoding"; Leviathan et al. 2023, "Speculative decoding").

A further row costs little while a step is spent on reading weights and much when it is spent on
multiplying. Both prices are measured: what a step takes by its rows, and how often a looked-up
token is right by the length of the run that found it. Tokens are looked up, and scored, even while
none are tried, so that a change is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_DRAFTS = 8
LONGEST_RUN = 4
_MEMORY = 0.99  # weight of all that was, with each new step
_PRIOR_RUNS = 4.0  # lookups' worth of belief in the prior
_PRIOR_RIGHT = (0.2, 0.5, 0.7, 0.8)  # by the run's length
_FREE_ROWS = 24.0  # prior: a step costs as much as that many of its rows, before the first one


@dataclass(slots=True)
class Draft:
    """Looked-up tokens of one document. `document` counts the documents of the step."""

    document: int
    run: int  # tokens of the run that was found
    count: int
    first: int
    tried: int = 0


class Speculation:
    """Decides on drafts and learns from what became of them."""

    def __init__(self) -> None:
        self._right = [_PRIOR_RUNS * share for share in _PRIOR_RIGHT]
        self._wrong = [_PRIOR_RUNS * (1 - share) for share in _PRIOR_RIGHT]
        # Decayed sums over steps, for a line of seconds by rows.
        self._n = self._r = self._rr = self._t = self._rt = 0.0

    def decide(self, drafts: Sequence[Draft], rows: int, most_rows: int) -> None:
        """Set how many tokens of each draft to try.

        One more row is worth it while the tokens it is expected to bring, over what it costs, are
        more than the step brings over its own cost.

        Args:
            drafts: of the step's documents.
            rows: of the step without drafts.
            most_rows: that all drafts together may take.
        """
        fixed, by_row = self._cost()
        bar = by_row * rows / max(fixed + by_row * rows, 1e-9)
        for draft in sorted(drafts, key=lambda draft: -draft.run):
            share = self._share(draft.run)
            expected = share
            draft.tried = 0
            while draft.tried < min(draft.count, most_rows) and expected > bar:
                draft.tried += 1
                expected *= share
            most_rows -= draft.tried

    def learn(self, draft: Draft, made: int, chosen: int) -> None:
        """Count what was right: `made` tokens came of the step, the first of them `chosen`."""
        index = min(draft.run, LONGEST_RUN) - 1
        if draft.tried:
            right = min(made - 1, draft.tried)
            wrong = int(right < draft.tried)
        else:
            right = int(draft.first == chosen)
            wrong = 1 - right
        for _ in range(right + wrong):
            self._right[index] *= _MEMORY
            self._wrong[index] *= _MEMORY
        self._right[index] += right
        self._wrong[index] += wrong

    def took(self, rows: int, seconds: float) -> None:
        """Count a step."""
        self._n = self._n * _MEMORY + 1
        self._r = self._r * _MEMORY + rows
        self._rr = self._rr * _MEMORY + rows * rows
        self._t = self._t * _MEMORY + seconds
        self._rt = self._rt * _MEMORY + rows * seconds

    def _share(self, run: int) -> float:
        """How often a looked-up token is right if those before it are."""
        index = min(run, LONGEST_RUN) - 1
        return self._right[index] / (self._right[index] + self._wrong[index])

    def _cost(self) -> tuple[float, float]:
        """Seconds of a step: fixed, and by row. A line through the steps, drawn towards a prior."""
        if not self._n:
            return _FREE_ROWS, 1.0
        rows, seconds = self._r / self._n, self._t / self._n
        spread = self._rr / self._n - rows * rows
        together = self._rt / self._n - rows * seconds
        prior = seconds / (rows + _FREE_ROWS)
        by_row = min(max((together + prior) / (spread + 1.0), 0.0), seconds / rows)
        return seconds - by_row * rows, by_row
