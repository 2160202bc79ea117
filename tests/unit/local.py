"""The HTTP application over an engine in this process: no Ray, no sockets."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from serve_app.api.app import create_app
from serve_app.api.auth import Authenticate
from serve_app.api.backend import finished
from serve_app.api.limiter import RateLimiter
from serve_app.api.service import SummaryService
from serve_app.calls import Call, Outcome, Probe, Rejected
from serve_app.config import ApiSettings, Limits, RateLimitSettings
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.client import EngineClient
from serve_app.engine.protocol import EngineRequest, Finished, QueueFullError, Tokens
from serve_app.errors import ServiceError
from serve_app.usage.writer import UsageSink


class LocalBackend:
    """`Backend` on an `EngineClient`; remembers the calls it was given."""

    def __init__(self, client: EngineClient, limits: Limits) -> None:
        self.calls: list[Call] = []
        self._client = client
        self._limits = limits

    async def run(self, call: Call) -> Finished:
        self.calls.append(call)
        try:
            outcome: Outcome = await self._client.run(_request(call, stream=False))
        except QueueFullError as error:
            outcome = Rejected(error.message, error.retry_after_s, error.late_s)
        return finished(outcome, self._limits)

    async def stream(self, call: Call) -> AsyncGenerator[Tokens | Finished]:
        self.calls.append(call)
        async for event in self._client.events(_request(call, stream=True)):
            yield event if isinstance(event, Tokens) else finished(event, self._limits)

    async def probe(self, max_age_s: float) -> Probe:
        return Probe(0.5, self._client.load(), 1)


@dataclass
class Recorded:
    """`Telemetry` that remembers."""

    requests: list[tuple[str, int]] = field(default_factory=list)
    summaries: list[tuple[bool, int]] = field(default_factory=list)
    in_flight: Counter[str] = field(default_factory=Counter)
    bills: list[tuple[str, int, int, int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def request(self, route: str, status: int, milliseconds: float) -> None:
        assert milliseconds >= 0
        self.requests.append((route, status))

    def summary(self, *, truncated: bool, chunks: int) -> None:
        self.summaries.append((truncated, chunks))

    def entered(self, client: str) -> None:
        self.in_flight[client] += 1

    def left(self, client: str, status: int, input_tokens: int, output_tokens: int) -> None:
        self.in_flight[client] -= 1
        self.bills.append((client, status, input_tokens, output_tokens))

    def failed(self, error: ServiceError) -> None:
        self.failures.append(error.kind)

    def rate_limited(self, limit: str) -> None:
        self.refusals.append(limit)

    def usage_dropped(self, count: int) -> None:
        raise AssertionError("nothing here writes usage events")


@dataclass
class Local:
    """The running application and what stands behind it."""

    app: FastAPI
    http: httpx.AsyncClient
    backend: LocalBackend
    telemetry: Recorded
    service: SummaryService


@asynccontextmanager
async def local_app(
    checkpoint: Checkpoint,
    client: EngineClient,
    *,
    limits: dict[str, Any] | None = None,
    authenticate: Authenticate = lambda _request: "tester",
    max_input_tokens: int | None = None,
    usage: UsageSink | None = None,
    rate_limits: dict[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Local]:
    """The application with these limits, and an HTTP client for it."""
    said = Limits(**(limits or {}))
    backend = LocalBackend(client, said)
    service = SummaryService(checkpoint, backend, said, ApiSettings(), max_input_tokens)
    telemetry = Recorded()
    settings = RateLimitSettings(enabled=rate_limits is not None, **(rate_limits or {}))
    limiter = RateLimiter(settings, telemetry.rate_limited, clock)
    app = create_app(service, authenticate, telemetry, ApiSettings(), limiter=limiter, usage=usage)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
        yield Local(app, http, backend, telemetry, service)


def _request(call: Call, *, stream: bool) -> EngineRequest:
    deadline = time.monotonic() + call.timeout_s
    return EngineRequest(call.id, call.input_ids, call.settings, deadline, stream, call.share)
