"""The engines' waiting line: first come first served within a share, shares in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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

    @property
    def tokens(self) -> int:
        """Encoder input length."""
        return len(self.request.input_ids)

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

    Each share (`EngineRequest.share`) has a line of its own, and the lines take turns: a client
    with three hundred parts of a document waits behind them itself, nobody else does.
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Entry]] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Entry]:
        lines = [list(line) for line in self._lines.values()]
        for turn in range(max(map(len, lines), default=0)):
            for line in lines:
                if turn < len(line):
                    yield line[turn]

    def push(self, entry: Entry) -> None:
        """Put an entry at the end of its share's line."""
        self._lines.setdefault(entry.request.share, deque()).append(entry)
        self.tokens += entry.tokens

    def put_back(self, entry: Entry) -> None:
        """Put an entry in front of all others."""
        share = entry.request.share
        self._lines.setdefault(share, deque()).appendleft(entry)
        self._lines.move_to_end(share, last=False)
        self.tokens += entry.tokens

    def peek(self) -> Entry:
        """The entry whose turn it is. Raises `IndexError` when none waits."""
        for line in self._lines.values():
            return line[0]
        raise IndexError("the queue is empty")

    def pop(self) -> Entry:
        """Take the entry whose turn it is; its share's next turn comes after all others'."""
        entry = self.peek()
        share = entry.request.share
        line = self._lines[share]
        line.popleft()
        self.tokens -= entry.tokens
        if line:
            self._lines.move_to_end(share)
        else:
            del self._lines[share]
        return entry

    def take(self, wanted: Callable[[Entry], object]) -> list[Entry]:
        """Take out all entries that `wanted` accepts, asked in the order of their turns."""
        taken = [entry for entry in self if wanted(entry)]
        gone = set(map(id, taken))
        for share in [entry.request.share for entry in taken]:
            if (line := self._lines.get(share)) is not None:
                kept = deque(entry for entry in line if id(entry) not in gone)
                if kept:
                    self._lines[share] = kept
                else:
                    del self._lines[share]
        self.tokens -= sum(entry.tokens for entry in taken)
        return taken
