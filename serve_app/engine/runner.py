"""What the scheduler asks of whoever holds the running batch: one on a CPU, one on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from serve_app.engine.queue import Entry
from serve_app.engine.weights import Shape


@dataclass(frozen=True, slots=True)
class Plan:
    """What to make room for.

    Args:
        device: torch device.
        dtype: `float32`, `bfloat16` or `int8`.
        rows: of the batch; a document takes one for each beam. 0: what suits the device.
        steps: new tokens of a document.
        source: input tokens of a document.
        speculation: whether greedy documents may be advanced by lookup.
        encode_tokens: that are encoded at once, at most, padding included.
        rounded: work in the rounded-up views that CUDA graphs need, without them; for tests.
    """

    device: str
    dtype: str
    rows: int
    steps: int
    source: int
    speculation: bool = True
    encode_tokens: int = 4_096
    rounded: bool = False


class Advance(NamedTuple):
    """What a step did for a document; a tuple, because a step makes hundreds of them.

    `made` counts its new tokens, `new` are they, for a request that streams. `output` is all it
    has, once it is done: without the start token, with the end token if it has come to that.
    `drafted` counts the looked-up tokens that were tried.
    """

    entry: Entry
    made: int
    new: Sequence[int]
    output: list[int] | None
    drafted: int = 0


class Runner(Protocol):
    """Documents in slots. All methods are called on the engine's thread.

    Attributes:
        shape: the model's.
        most_rows: of the batch.
        steps_some: whether `step` can leave documents out.
        admit_share: of these must be free before documents are worth encoding, while more of them
            wait than have room: where a few cost as much as many. 0: none.
    """

    shape: Shape
    most_rows: int
    steps_some: bool
    admit_share: float

    @property
    def entries(self) -> list[Entry]:
        """The documents."""

    @property
    def rows(self) -> int:
        """Rows taken."""

    @property
    def weight_bytes(self) -> int:
        """Size of the model."""

    @property
    def cache_bytes(self) -> int:
        """Size of what is kept for attention."""

    def admit(self, entries: Sequence[Entry]) -> None:
        """Encode documents and give them slots. When it raises, none has been admitted."""

    def leave(self, entries: Sequence[Entry]) -> None:
        """Free the slots of documents."""

    def step(self, only: Sequence[Entry] | None = None) -> list[Advance]:
        """One decode step for all documents, or, where `steps_some`, for these of `entries`.

        What it did, or what the one before did.


        Those that were done before another's error are given, and the error is raised next time.
        """
