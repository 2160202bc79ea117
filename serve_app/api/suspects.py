"""Texts under which replicas died: whoever kills them one after the other is refused.

A replica that dies takes a whole batch with it and does not say which text was to blame, if any.
All are tried once more. A text that is the only one tried again when the second replica dies is to
blame. Where several are, all are suspects: when one comes again, it runs while no other suspect
does, and is to blame if a replica dies once more. A suspect that gets its summary is none any more.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

from serve_app.calls import Call
from serve_app.errors import PoisonError

REMEMBERED_S = 600.0
_MOST = 1_000  # texts remembered


@dataclass(slots=True)
class _Record:
    until: float
    blamed: bool


class Suspects:
    """What one Api replica remembers of texts: digests, with a key of its own.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._records: OrderedDict[bytes, _Record] = OrderedDict()  # the oldest first
        self._turn = asyncio.Lock()
        self._again: set[Trial] = set()  # calls that are tried once more

    @asynccontextmanager
    async def trial(self, call: Call) -> AsyncGenerator[Trial]:
        """Around all attempts of a call; a suspect waits until no other one runs.

        Raises:
            PoisonError: its text is to blame.
        """
        suspect = self._suspect(call)
        async with self._turn if suspect else nullcontext():
            # Another call with the same text may have had its turn before.
            trial = Trial(self, call, suspect=suspect and self._suspect(call))
            try:
                yield trial
            finally:
                self._again.discard(trial)

    def again(self, trial: Trial) -> None:
        """The call is tried once more."""
        self._again.add(trial)
        if len(self._again) > 1:
            for one in self._again:
                one.crowded = True

    def remember(self, call: Call, *, blamed: bool) -> None:
        """A text is a suspect, or to blame."""
        digest = self._digest(call)
        self._records.pop(digest, None)
        self._records[digest] = _Record(self._clock() + REMEMBERED_S, blamed)
        if len(self._records) > _MOST:
            self._records.popitem(last=False)

    def forget(self, call: Call) -> None:
        """A text is no suspect any more."""
        self._records.pop(self._digest(call), None)

    def _suspect(self, call: Call) -> bool:
        now = self._clock()
        while self._records and next(iter(self._records.values())).until <= now:
            self._records.popitem(last=False)
        # Nearly always there is none: then no text needs a digest.
        record = self._records.get(self._digest(call)) if self._records else None
        if record is not None and record.blamed:
            raise PoisonError(record.until - now)
        return record is not None

    def _digest(self, call: Call) -> bytes:
        ids = array("q", call.input_ids).tobytes()
        return hashlib.blake2b(ids, digest_size=16, key=self._key).digest()


class Trial:
    """The attempts of one call. `crowded`: others were tried again beside it."""

    def __init__(self, suspects: Suspects, call: Call, *, suspect: bool) -> None:
        self.crowded = False
        self._suspects = suspects
        self._call = call
        self._suspect = suspect
        self._deaths = 0

    def died(self, *, last: bool) -> None:
        """A replica died under it; `last`: it is not tried again.

        Raises:
            PoisonError: its text is to blame.
        """
        self._deaths += 1
        if self._suspect or (self._deaths > 1 and not self.crowded):
            self._suspects.remember(self._call, blamed=True)
            error = PoisonError(REMEMBERED_S)
            error.usage = None
            raise error
        if last:
            self._suspects.remember(self._call, blamed=False)
        else:
            self._suspects.again(self)

    def succeeded(self) -> None:
        """It has its result."""
        if self._suspect:
            self._suspects.forget(self._call)
