"""What a request has used, whether it ends in a summary or in an error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serve_app.api.schemas import UsageBody
from serve_app.calls import Call
from serve_app.engine.protocol import Usage
from serve_app.errors import ServiceError

_SMOOTHING = 0.1  # weight of the newest wait


@dataclass(slots=True)
class Waits:
    """How long calls have waited in the engines' queues lately, smoothed, in milliseconds."""

    queue_ms: float = 0.0

    def saw(self, queue_ms: float) -> None:
        """A call has told how long it waited."""
        self.queue_ms += _SMOOTHING * (queue_ms - self.queue_ms)


@dataclass(slots=True)
class Meter:
    """One call to an engine. `usage` is what the engine says it cost, once it has said so."""

    output_tokens: int = 0  # seen so far
    usage: Usage | None = None


@dataclass(slots=True)
class Bill:
    """What a request has used so far.

    The engine tells what a call has cost, also when it failed there. A call that was given up
    (its client has gone, another part failed) or whose replica died tells nothing. Then the time
    since it was sent counts: as wait what other calls have waited lately, the rest as compute; and
    its input, if anything of the time is compute. Such a bill is `estimated`.
    """

    waits: Waits = field(default_factory=Waits)
    input_tokens: int = 0
    output_tokens: int = 0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    estimated: bool = False
    began: float = field(default_factory=time.monotonic)

    @contextmanager
    def stage(self) -> Iterator[Stage]:
        """Calls that run side by side: tokens add up, of the times the longest count."""
        stage = Stage(self)
        try:
            yield stage
        finally:
            self.input_tokens += sum(one.input_tokens for one in stage.passes)
            self.output_tokens += sum(one.output_tokens for one in stage.passes)
            self.queue_ms += max((one.queue_ms for one in stage.passes), default=0.0)
            self.compute_ms += max((one.compute_ms for one in stage.passes), default=0.0)

    def body(self, chunks: int) -> UsageBody:
        """As it stands in an answer."""
        return UsageBody(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            chunks=chunks,
            queue_ms=round(self.queue_ms, 2),
            compute_ms=round(self.compute_ms, 2),
            total_ms=round((time.monotonic() - self.began) * 1e3, 2),
        )


class Stage:
    """Calls of one stage of a request, which run side by side."""

    def __init__(self, bill: Bill) -> None:
        self.passes: list[Usage] = []
        self._bill = bill

    @contextmanager
    def call(self, call: Call) -> Iterator[Meter]:
        """Count a call, however it ends."""
        meter, sent = Meter(), time.monotonic()
        try:
            yield meter
        except ServiceError as error:
            meter.usage = error.usage
            raise
        finally:
            if meter.usage is None:
                self.passes.append(self._estimate(call, meter, time.monotonic() - sent))
            else:
                self._bill.waits.saw(meter.usage.queue_ms)
                self.passes.append(meter.usage)

    def _estimate(self, call: Call, meter: Meter, seconds: float) -> Usage:
        self._bill.estimated = True
        queue_ms = min(self._bill.waits.queue_ms, seconds * 1e3)
        compute_ms = seconds * 1e3 - queue_ms
        began = compute_ms > 0 or meter.output_tokens > 0
        return Usage(len(call.input_ids) if began else 0, meter.output_tokens, queue_ms, compute_ms)
