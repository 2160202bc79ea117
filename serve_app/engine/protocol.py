"""What the service asks of an engine, and what an engine answers.

One engine runs on a thread of its own. Requests go in through `Engine.submit`; everything that
happens afterwards comes back as lists of events through one callback, called on the engine's
thread at most once per decode step, so that a step costs one crossing of threads however many
requests it moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from serve_app.engine.work import Work


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Decoding settings of one request, named and meant as in `transformers.GenerationConfig`.

    `min_new_tokens` and `max_new_tokens` count tokens after the decoder's start token, the end
    token included. `early_stopping` and `length_penalty` only matter with `num_beams` > 1.
    """

    num_beams: int = 1
    min_new_tokens: int = 0
    max_new_tokens: int = 128
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    early_stopping: bool = False
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class TokenConstraints:
    """What a model's configuration says of single tokens, as in `transformers.GenerationConfig`.

    `suppressed` never come, `begin_suppressed` not first. `forced_first` comes first,
    `forced_last` when `max_new_tokens` end the text.
    """

    suppressed: tuple[int, ...] = ()
    begin_suppressed: tuple[int, ...] = ()
    forced_first: int | None = None
    forced_last: int | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One encoder input to summarize.

    `input_ids` already carries prefix and end token. `deadline` is in `time.monotonic()` seconds
    of the engine's own process. `stream` asks for `Tokens` events while decoding, which only
    greedy requests can give: beams have no settled prefix before the end. Requests of one `share`
    (a client) wait for each other; shares take turns. `origin` says in logs whose request it is.
    """

    id: str
    input_ids: Sequence[int]
    settings: GenerationSettings
    deadline: float | None = None
    stream: bool = False
    share: str = ""
    origin: str = ""


class FinishReason(StrEnum):
    """Why decoding ended."""

    STOP = "stop"
    MAX_NEW_TOKENS = "max_new_tokens"


class FailureReason(StrEnum):
    """Why a request ended without a result."""

    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    ERROR = "error"
    STOPPED = "stopped"  # the engine broke under it: no fault of its own, as far as is known


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost. Times in milliseconds; tokens without the decoder's start and end.

    `encode_ms`, where the engine knows it, is the first part of `compute_ms`.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    encode_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """New output tokens of a streaming request, in order."""

    id: str
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Finished:
    """The whole output of a request: `ids` without start, end or padding tokens."""

    id: str
    ids: Sequence[int]
    reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The request is over and has no result; `usage` is what it had cost by then."""

    id: str
    reason: FailureReason
    message: str
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class BatchRan:
    """A batch went through the model; for metrics. `seconds` is wall time on the device.

    `encode_seconds` of them went into encoding documents that came in, 0 where none did. Of the
    `drafted` tokens that were tried, `accepted` ones were right: they are among the
    `output_tokens`. `preempted` requests went back to the queue for want of memory.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    seconds: float
    drafted: int = 0
    accepted: int = 0
    encode_seconds: float = 0.0
    preempted: int = 0
    id: str = field(default="", init=False)


@dataclass(frozen=True, slots=True)
class Stopped:
    """The engine has broken down, and every request in it has failed: its last event."""

    message: str
    id: str = field(default="", init=False)


Event = Tokens | Finished | Failed | BatchRan | Stopped
Emit = Callable[[list[Event]], None]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Load figures of one engine at one moment.

    `drain_tokens_per_s` is the measured rate at which input tokens leave the queue, or None
    before anything has been measured. `last_step_age_s` is None before the first step.
    `no_progress_s` is the time since the last step while there is something to do, else 0. `slots`
    are the rows of the running batch, `slots_used` those taken; a document takes one per beam.
    """

    waiting_requests: int
    waiting_tokens: int
    running_requests: int
    steps: int
    drain_tokens_per_s: float | None
    last_step_age_s: float | None
    no_progress_s: float = 0.0
    slots: int = 0
    slots_used: int = 0

    def retry_after_s(self, extra_tokens: int = 0) -> float:
        """Seconds until the tokens waiting now have drained at the measured rate."""
        if not self.drain_tokens_per_s:
            return 1.0
        return (self.waiting_tokens + extra_tokens) / self.drain_tokens_per_s


class QueueFullError(Exception):
    """The engine's bounded queue cannot take the request. `load` is its state at that moment.

    `retry_after_s` is when to come back, and `outcome` how the refusal is counted.
    """

    outcome = "rejected"
    late_s: float | None = None

    def __init__(self, message: str, load: EngineLoad, retry_after_s: float | None = None) -> None:
        super().__init__(message, load)
        self.message = message
        self.load = load
        self.retry_after_s = load.retry_after_s() if retry_after_s is None else retry_after_s


class TooLateError(QueueFullError):
    """The request would be done `late_s` after its deadline, or too close to it."""

    outcome = "too_late"

    def __init__(self, late_s: float, load: EngineLoad) -> None:
        super().__init__(self.text(late_s), load, late_s)
        self.late_s = late_s

    @staticmethod
    def text(late_s: float) -> str:
        """What a caller is told."""
        return f"the queue is too long: the request would be {late_s:.1f} s late"


class EngineStoppedError(Exception):
    """The engine takes no more requests: it is closing, or has broken down."""


class Engine(Protocol):
    """A T5 engine. All methods may be called from any thread."""

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; its events follow through the callback given at construction.

        Raises:
            QueueFullError: the bounded queue is full, or (`TooLateError`) so much is before the
                request that it would be late.
            EngineStoppedError: the engine is closing or has broken down.
        """

    def cancel(self, request_id: str) -> None:
        """Stop work on a request before the next step. Unknown and finished ids are ignored."""

    def load(self) -> EngineLoad:
        """Load figures as of now."""

    def work(self) -> Work | None:
        """The work there is. None: there is some, and not yet known what it costs.

        Costs are measured from one call to the next, so one of the callers asks now and then.
        """

    def stalled(self, limit_s: float) -> str | None:
        """Say why the engine makes no progress, or None.

        It has broken down, or is busy without a step for `limit_s`.
        """

    def close(self) -> None:
        """Stop the thread; requests still inside fail as cancelled."""
