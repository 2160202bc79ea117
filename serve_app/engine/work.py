"""How much work an engine has, in seconds that it would take with a full batch.

Tokens of different kinds cost differently, and a decoded token costs the less the more rows share
its step. So an engine counts what it did and how long that took (`Tally`), and a `Meter` makes of
it what an input token costs, and a row in a step of a full batch. By that measure an engine does
one second of work in a second when its batch is full, however long its documents are.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

HALF_LIFE_S = 300.0  # of busy time, after which what was measured counts half
LEAST_TOKENS = 1_000.0  # encoded, before which nothing counts as measured
# Weight of the belief that a step takes time in proportion to its rows, in squares of their mean:
# where the rows never change, nothing tells what a fuller batch would gain.
BELIEF = 0.05


@dataclass(slots=True)
class Tally:
    """Sums since an engine began. `squares` and `products`: rows squared, rows times seconds."""

    encoded_tokens: float = 0.0
    encode_s: float = 0.0
    steps: float = 0.0
    step_s: float = 0.0
    rows: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    documents: float = 0.0
    made: float = 0.0
    finished: float = 0.0
    cpu_s: float = 0.0  # of `encode_s` and `step_s`, what the engine's thread had a processor for

    def encoded(self, tokens: int, seconds: float) -> None:
        """So many input tokens were encoded."""
        self.encoded_tokens += tokens
        self.encode_s += seconds

    def stepped(self, rows: int, documents: int, made: int, seconds: float) -> None:
        """A decode step of so many rows and documents made so many tokens."""
        self.steps += 1
        self.step_s += seconds
        self.rows += rows
        self.squares += rows * rows
        self.products += rows * seconds
        self.documents += documents
        self.made += made


@dataclass(frozen=True, slots=True)
class Work:
    """Work in front of an engine and behind it, in seconds of a full batch.

    `done_s` and `finished`, requests, count from the beginning. What `running_s` and `waiting_s`
    will decode is taken to be as long as recent outputs were.
    """

    waiting_s: float
    running_s: float
    done_s: float
    finished: float


class Meter:
    """Tells what work costs, from tallies of an engine.

    Args:
        slots: rows of a full batch.
        half_life_s: of busy time, after which what was measured counts half.
    """

    def __init__(self, slots: int, half_life_s: float = HALF_LIFE_S) -> None:
        self._slots = max(slots, 1)
        self._half_life_s = half_life_s
        self._last: Tally | None = None
        self._recent = Tally()
        self._done_s = 0.0

    def read(self, tally: Tally) -> None:
        """Take in what was done since the last call; the first begins, without the warm-up."""
        if self._last is None:
            self._last = Tally(*astuple(tally))
            return
        fresh = [new - old for new, old in zip(astuple(tally), astuple(self._last), strict=True)]
        self._last = Tally(*astuple(tally))
        busy_s = fresh[1] + fresh[3]
        keep = 0.5 ** (busy_s / self._half_life_s)
        recent = astuple(self._recent)
        self._recent = Tally(*(keep * old + new for old, new in zip(recent, fresh, strict=True)))
        if self.measured:
            self._done_s += self.token_s * fresh[0] + self.row_s * fresh[4]

    @property
    def measured(self) -> bool:
        """Whether enough was seen."""
        return self._recent.encoded_tokens >= LEAST_TOKENS

    @property
    def token_s(self) -> float:
        """Seconds to encode an input token."""
        return self._recent.encode_s / max(self._recent.encoded_tokens, 1.0)

    @property
    def row_s(self) -> float:
        """Seconds of a row in a step of a full batch."""
        if not self._recent.rows:
            return 0.0
        full = max(self._slots, self._recent.rows / self._recent.steps)
        fixed_s, more_s = self.step
        return more_s + fixed_s / full

    @property
    def step(self) -> tuple[float, float]:
        """Seconds of any step, and more of them for each row: a line through steps' times."""
        seen = self._recent
        if not seen.rows:
            return 0.0, 0.0
        rows, seconds = seen.rows / seen.steps, seen.step_s / seen.steps
        proportional = seconds / rows
        belief = BELIEF * rows * rows
        covariance = seen.products / seen.steps - rows * seconds
        variance = max(seen.squares / seen.steps - rows * rows, 0.0)
        slope = (covariance + belief * proportional) / (variance + belief)
        slope = min(max(slope, 0.0), proportional)
        return seconds - slope * rows, slope

    @property
    def steps(self) -> float | None:
        """Steps of a document, as recent ones took; None: none has finished."""
        seen = self._recent
        if not seen.finished or not seen.made:
            return None
        return seen.made / seen.finished / self.made_per_step

    @property
    def made_per_step(self) -> float:
        """Tokens that a step makes of a document; above 1 where looked-up ones are right."""
        return self._recent.made / self._recent.documents if self._recent.documents else 1.0

    @property
    def encoding(self) -> float:
        """Which part of the time at work went into encoding."""
        seen = self._recent
        return seen.encode_s / max(seen.encode_s + seen.step_s, 1e-9)

    @property
    def computing(self) -> float:
        """Which part of the time at work the engine's thread had a processor, from 0 to 1."""
        seen = self._recent
        return min(seen.cpu_s / max(seen.encode_s + seen.step_s, 1e-9), 1.0)

    def work(self, waiting: tuple[float, float], running: tuple[float, float]) -> Work | None:
        """The work of so many input tokens to encode and rows times steps to decode.

        Returns:
            None while there is some, and nobody knows what it costs.
        """
        if not self.measured and any((*waiting, *running)):
            return None
        waiting_s, running_s = (
            self.token_s * tokens + self.row_s * row_steps
            for tokens, row_steps in (waiting, running)
        )
        return Work(waiting_s, running_s, self._done_s, self._last.finished if self._last else 0.0)
