"""What an engine has just refused as late is not asked of it again at once.

A refusal by the engine costs the caller two processes and some turns at the Python lock that the
engine's thread holds most of the time, just when there is most to do. So who asks for the same with
no more time is refused here, for as long as the engine would refuse it, `_HOLD_S` at most: others
may have left the queue, or another replica may have room.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from serve_app.calls import Call, Outcome, Rejected
from serve_app.engine.protocol import GenerationSettings, TooLateError

_HOLD_S = 0.1
_MOST = 256  # kinds of calls remembered, before old ones are looked for

_Kind = tuple[str, GenerationSettings]


class Gate:
    """Used on one event loop. `clock` is in seconds; for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refused: dict[_Kind, tuple[float, float]] = {}  # when, and what time would have done

    def saw(self, call: Call, outcome: Outcome) -> None:
        """An engine has answered a call."""
        if not isinstance(outcome, Rejected) or outcome.late_s is None:
            return
        now = self._clock()
        if len(self._refused) >= _MOST:
            kept = {kind: one for kind, one in self._refused.items() if now - one[0] <= _HOLD_S}
            self._refused = kept
        self._refused[call.share, call.settings] = now, call.timeout_s + outcome.late_s

    def refusal(self, call: Call) -> Rejected | None:
        """The answer that the engine would give, or None: ask it."""
        refused = self._refused.get((call.share, call.settings))
        if refused is None:
            return None
        at, needed = refused
        gone = self._clock() - at
        late_s = needed - gone - call.timeout_s
        if gone > _HOLD_S or late_s <= 0:
            return None
        return Rejected(TooLateError.text(late_s), late_s, late_s)
