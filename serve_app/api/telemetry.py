"""What the ingress counts, as Prometheus series through Ray Serve."""

from __future__ import annotations

import asyncio
from typing import Protocol

from serve_app.errors import ServiceError
from serve_app.metrics.clients import Clients
from serve_app.metrics.exporter import Exporter
from serve_app.metrics.series import API_SERIES

_SHED = (429, 503)


class Telemetry(Protocol):
    """Where the ingress reports to."""

    def entered(self, client: str) -> None:
        """A request of this client has begun; `left` follows."""

    def left(self, client: str, status: int, input_tokens: int, output_tokens: int) -> None:
        """A request that `entered` is over. Tokens as in its usage event."""

    def request(self, route: str, status: int, milliseconds: float) -> None:
        """A request has been answered."""

    def summary(self, *, truncated: bool, chunks: int) -> None:
        """A summary was made; truncation is never silent."""

    def failed(self, error: ServiceError) -> None:
        """A text got no summary: the whole request's answer, or one of a batch."""

    def rate_limited(self, limit: str) -> None:
        """A request was refused for a limit of its client."""

    def usage_dropped(self, count: int) -> None:
        """So many usage events could not be kept. Called from any thread."""


class ServeTelemetry:
    """`Telemetry` on `ray.serve.metrics`; made on a replica's event loop."""

    def __init__(self) -> None:
        self._to = Exporter(API_SERIES)
        self._clients = Clients()
        self._exporting = asyncio.create_task(self._to.run(self._refresh))

    def entered(self, client: str) -> None:
        """See `Telemetry.entered`."""
        self._clients.entered(client)

    def left(self, client: str, status: int, input_tokens: int, output_tokens: int) -> None:
        """See `Telemetry.left`."""
        label = self._clients.left(client)
        self._to.add("t5_client_requests", 1, label, f"{status // 100}xx")
        self._to.add("t5_client_tokens", input_tokens, label, "input")
        self._to.add("t5_client_tokens", output_tokens, label, "output")

    def request(self, route: str, status: int, milliseconds: float) -> None:
        """See `Telemetry.request`."""
        self._to.add("t5_http_requests", 1, route, str(status))
        self._to.observe("t5_http_latency_ms", milliseconds, route)

    def summary(self, *, truncated: bool, chunks: int) -> None:
        """See `Telemetry.summary`."""
        self._to.add("t5_chunks", chunks)
        self._to.add("t5_truncated_texts", truncated)

    def failed(self, error: ServiceError) -> None:
        """See `Telemetry.failed`."""
        if int(error.status) in _SHED:
            self._to.add("t5_shed_texts", 1, error.kind)

    def rate_limited(self, limit: str) -> None:
        """See `Telemetry.rate_limited`."""
        self._to.add("t5_rate_limited", 1, limit)

    def usage_dropped(self, count: int) -> None:
        """See `Telemetry.usage_dropped`."""
        self._to.inc_now("t5_usage_events_dropped", count)

    def _refresh(self) -> None:
        for client, count in self._clients.in_flight.items():
            self._to.set("t5_client_requests_in_flight", count, client)
