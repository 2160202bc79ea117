"""What an engine has just refused as late is not asked of it again at once.

A refusal by the engine costs the caller two processes and some turns at the Python lock that the
engine's thread holds most of the time, just when there is most to do. So who asks for the same
with no more time is refused here: for as long as the engine would refuse it, `_HOLD_S` at most, as
others may have left the queue or another replica may have room. After that, while it keeps
refusing, it is asked only a little more often than it has lately given answers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.calls import Call, Outcome, Rejected
from serve_app.engine.protocol import Finished, GenerationSettings, TooLateError

_HOLD_S = 0.1
_FORGET_S = 1.0  # after a refusal, in which there was no other
_MOST = 256  # kinds of calls remembered, before old ones are looked for
_RATE_S = 2.0  # over which answers are counted
_MORE = 1.5  # than were answered: so it finds out where it has become faster
_LEAST_RATE = 20.0  # calls a second that it is asked at all events

_Kind = tuple[str, GenerationSettings]


@dataclass(slots=True)
class _Refused:
    at: float
    time_s: float  # of the call
    late_s: float
    ask_at: float  # when the engine may be asked again


@dataclass(slots=True)
class _Seen:
    refused: _Refused | None = None
    answered: deque[float] = field(default_factory=lambda: deque(maxlen=1_024))  # when


class Gate:
    """Used on one event loop. `clock` is in seconds; for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[_Kind, _Seen] = {}

    def saw(self, call: Call, outcome: Outcome) -> None:
        """An engine has answered a call."""
        now, kind = self._clock(), (call.share, call.settings)
        if isinstance(outcome, Finished):
            self._of(kind, now).answered.append(now)
        elif isinstance(outcome, Rejected) and outcome.late_s is not None:
            seen = self._of(kind, now)
            ask_at = now if seen.refused is None else seen.refused.ask_at
            seen.refused = _Refused(now, call.timeout_s, outcome.late_s, ask_at)

    def refusal(self, call: Call) -> Rejected | None:
        """The answer that the engine would give, or None: ask it."""
        seen, now = self._seen.get((call.share, call.settings)), self._clock()
        if seen is None or seen.refused is None:
            return None
        refused = seen.refused
        gone = now - refused.at
        needed_s = refused.time_s + refused.late_s
        if gone > _FORGET_S:
            seen.refused = None
            return None
        if call.timeout_s >= needed_s:
            return None
        late_s = needed_s - gone - call.timeout_s
        if gone <= _HOLD_S and late_s > 0:
            return _rejected(late_s)
        if now < refused.ask_at:
            return _rejected(max(late_s, refused.ask_at - now))
        rate = sum(now - at <= _RATE_S for at in seen.answered) / _RATE_S
        refused.ask_at = now + 1 / max(rate * _MORE, _LEAST_RATE)
        return None

    def _of(self, kind: _Kind, now: float) -> _Seen:
        if kind not in self._seen and len(self._seen) >= _MOST:
            self._seen = {
                kind: one
                for kind, one in self._seen.items()
                if (one.refused is not None and now - one.refused.at <= _FORGET_S)
                or (one.answered and now - one.answered[-1] <= _RATE_S)
            }
        return self._seen.setdefault(kind, _Seen())


def _rejected(late_s: float) -> Rejected:
    return Rejected(TooLateError.text(late_s), late_s, late_s)
