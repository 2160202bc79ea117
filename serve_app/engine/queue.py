"""The engines' waiting line: first come first served within a share, shares in turn by work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import count, takewhile

from serve_app.engine.protocol import EngineRequest, Usage


@dataclass(slots=True, eq=False)
class Entry:
    """A request on its way through an engine. Times in `time.monotonic()` seconds."""

    request: EngineRequest
    arrived: float
    started: float = 0.0
    encoded: float = 0.0
    made: int = 0  # output tokens so far
    streamed: int = 0  # of these, already handed out
    cancelled: bool = False
    over: bool = field(default=False)  # its last event has been emitted
    turn: tuple[float, int] = (0.0, 0)  # the queue's: lower ones go first

    @property
    def tokens(self) -> int:
        """Encoder input length."""
        return len(self.request.input_ids)

    @property
    def rows(self) -> int:
        """Rows of the batch that it takes, one for each beam."""
        return self.request.settings.num_beams

    @property
    def cost(self) -> int:
        """What a turn for it costs its share: tokens to encode and, at most, to decode."""
        settings = self.request.settings
        return self.tokens + settings.num_beams * settings.max_new_tokens

    @property
    def origin(self) -> str:
        """Whose it is, for logs."""
        return self.request.origin or self.request.id

    def usage(self, now: float) -> Usage:
        """What it has cost so far. Who has not left the queue has only waited."""
        if not self.started:
            return Usage(queue_ms=(now - self.arrived) * 1e3)
        return Usage(
            input_tokens=self.tokens,
            output_tokens=self.made,
            queue_ms=(self.started - self.arrived) * 1e3,
            compute_ms=(now - self.started) * 1e3,
            encode_ms=(self.encoded - self.started) * 1e3 if self.encoded else None,
        )

    def late(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return self.request.deadline is not None and now >= self.request.deadline


class FairQueue:
    """Waiting entries. Iterates in the order they should be taken.

    Each share (`EngineRequest.share`) has a line of its own, and the lines take turns by work, not
    by entries: start-time fair queueing (Goyal, Vin and Cheng 1996). An entry's turn comes when the
    others have had as much as its share had before it, and a share that comes new begins where the
    others are now: a client with three hundred parts of a document waits behind them itself, nobody
    else does.
    """

    def __init__(self) -> None:
        self._lines: dict[str, deque[Entry]] = {}
        self._had: dict[str, float] = {}  # the work at which a share's next turn comes
        self._now = 0.0  # the work at which the turn taken last came
        self._arrivals = count()
        self._length = 0
        self.tokens = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Entry]:
        return merge(*self._lines.values(), key=_turn)

    def full(self, entry: Entry, most_requests: int, most_tokens: int) -> str | None:
        """Which bound keeps an entry out, or None.

        A share that has less of the queue than its part, if all had the same, is let in beyond the
        bounds, up to twice of them: whoever came first must not keep out everybody else.
        """
        # An entry longer than the whole bound still gets in when nothing else waits.
        if not self._length:
            return None
        own = self._lines.get(entry.request.share, ())
        shares = len(self._lines) + (not own)
        requests, tokens = len(own) + 1, sum(one.tokens for one in own) + entry.tokens
        crowded = self._length + 1 > 2 * most_requests
        if self._length + 1 > most_requests and (crowded or requests * shares > most_requests):
            return f"{most_requests} requests are waiting"
        total = self.tokens + entry.tokens
        crowded = total > 2 * most_tokens
        if total > most_tokens and (crowded or tokens * shares > most_tokens):
            return f"its limit is {most_tokens} tokens"
        return None

    def before(self, share: str) -> Iterator[Entry]:
        """Whose turns come before that of the share's next entry, in their order."""
        at = max(self._had.get(share, 0.0), self._now)
        return takewhile(lambda entry: entry.turn[0] <= at, self)

    def push(self, entry: Entry) -> None:
        """Put an entry at the end of its share's line."""
        share = entry.request.share
        at = max(self._had.get(share, 0.0), self._now)
        entry.turn = (at, next(self._arrivals))
        self._had[share] = at + entry.cost
        self._lines.setdefault(share, deque()).append(entry)
        self._length += 1
        self.tokens += entry.tokens

    def put_back(self, entry: Entry) -> None:
        """Put an entry that was taken in front of all others."""
        first = self.peek()
        at = self._now if first is None else min(self._now, first.turn[0])
        entry.turn = (at, -next(self._arrivals))
        self._lines.setdefault(entry.request.share, deque()).appendleft(entry)
        self._length += 1
        self.tokens += entry.tokens

    def peek(self, but: Container[str] = ()) -> Entry | None:
        """The entry whose turn it is, of shares not in `but`; None: none waits."""
        heads = (line[0] for share, line in self._lines.items() if share not in but)
        return min(heads, key=_turn, default=None)

    def pop(self, but: Container[str] = ()) -> Entry:
        """Take the entry that `peek` has. Raises `IndexError`: none waits."""
        entry = self.peek(but)
        if entry is None:
            raise IndexError("the queue is empty")
        self._now = max(self._now, entry.turn[0])
        share = entry.request.share
        self._lines[share].popleft()
        self._left([entry])
        return entry

    def take(self, wanted: Callable[[Entry], object]) -> list[Entry]:
        """Take out all entries that `wanted` accepts, asked in the order of their turns."""
        taken = [entry for entry in self if wanted(entry)]
        gone = set(map(id, taken))
        for share in {entry.request.share for entry in taken}:
            kept = deque(entry for entry in self._lines[share] if id(entry) not in gone)
            self._lines[share] = kept
            # It has not had what was taken out: the next one follows the last that stays.
            self._had[share] = kept[-1].turn[0] + kept[-1].cost if kept else 0.0
        self._left(taken)
        return taken

    def _left(self, entries: list[Entry]) -> None:
        self._length -= len(entries)
        self.tokens -= sum(entry.tokens for entry in entries)
        for share in {entry.request.share for entry in entries}:
            if not self._lines[share]:
                del self._lines[share]
        if not self._lines:
            # Nobody has waited for anybody: what shares had is of no account.
            self._had.clear()
            self._now = 0.0
        elif len(self._had) > 2 * len(self._lines) + 16:
            self._had = {share: had for share, had in self._had.items() if had > self._now}


def _turn(entry: Entry) -> tuple[float, int]:
    return entry.turn
