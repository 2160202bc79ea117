"""What passes between the HTTP ingress and the Summarizer: plain data, cheap to pickle.

Outcomes a caller must expect (rejected, late, failed) travel as values, not as exceptions: an
exception in a replica is logged with a traceback and counted as an error of the deployment.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from serve_app.engine.protocol import EngineLoad, Failed, Finished, GenerationSettings, Tokens


@dataclass(frozen=True, slots=True)
class Call:
    """One encoder input to run.

    `timeout_s` is what is left of the request's deadline; calls of one `share`, a client, wait for
    each other. `stage` is what it is for: `map`, `reduce` or `final`. `request_id` is that of its
    request, `traceparent` (W3C Trace Context; empty: none) of the span that it is part of.
    """

    id: str
    input_ids: Sequence[int]
    settings: GenerationSettings
    timeout_s: float
    share: str = ""
    stage: str = "final"
    request_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The replica's queue was full, or so long that the call would have been `late_s` late."""

    message: str
    retry_after_s: float
    late_s: float | None = None


Outcome = Finished | Failed | Rejected


@dataclass(frozen=True, slots=True)
class Probe:
    """Proof that a replica's engine works: a step completed `step_age_s` seconds ago."""

    step_age_s: float
    load: EngineLoad
    pid: int


class Backend(Protocol):
    """The ingress's view of the Summarizer. All errors are `ServiceError`s."""

    async def run(self, call: Call) -> Finished:
        """Run a call to its end."""

    def stream(self, call: Call) -> AsyncGenerator[Tokens | Finished]:
        """Run a call, giving tokens as they come; `Finished` is last."""

    async def probe(self, max_age_s: float) -> Probe:
        """Find a step younger than `max_age_s`, making one if need be."""
