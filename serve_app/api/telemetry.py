"""What the ingress counts, as Prometheus series through Ray Serve."""

from __future__ import annotations

from typing import Protocol

from ray.serve import metrics

_MS: list[float] = [
    5,
    10,
    25,
    50,
    100,
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    30_000,
    60_000,
    120_000,
    300_000,
]


class Telemetry(Protocol):
    """Where the ingress reports to."""

    def request(self, route: str, status: int, milliseconds: float) -> None:
        """A request has been answered."""

    def summary(self, *, truncated: bool, chunks: int) -> None:
        """A summary was made; truncation is never silent."""

    def rate_limited(self, limit: str) -> None:
        """A request was refused for a limit of its client."""

    def usage_dropped(self, count: int) -> None:
        """So many usage events could not be kept. Called from any thread."""


class ServeTelemetry:
    """`Telemetry` on `ray.serve.metrics`; Ray adds deployment, replica and application labels."""

    def __init__(self) -> None:
        self._requests = metrics.Counter(
            "t5_http_requests",
            description="HTTP requests answered.",
            tag_keys=("http_route", "status"),  # type: ignore[arg-type]  # Ray says tuple[str]
        )
        self._latency = metrics.Histogram(
            "t5_http_latency_ms",
            description="Time from request to the end of its answer.",
            boundaries=_MS,
            tag_keys=("http_route",),
        )
        self._truncated = metrics.Counter(
            "t5_truncated_texts", description="Texts of which a part was left out."
        )
        self._chunks = metrics.Counter("t5_chunks", description="Parts that texts were split into.")
        self._rate_limited = metrics.Counter(
            "t5_rate_limited",
            description="Requests refused for a limit of their client.",
            tag_keys=("limit",),
        )
        self._dropped = metrics.Counter(
            "t5_usage_events_dropped", description="Usage events that could not be kept."
        )

    def request(self, route: str, status: int, milliseconds: float) -> None:
        """See `Telemetry.request`."""
        self._requests.inc(1, tags={"http_route": route, "status": str(status)})
        self._latency.observe(max(milliseconds, 1e-3), tags={"http_route": route})

    def summary(self, *, truncated: bool, chunks: int) -> None:
        """See `Telemetry.summary`."""
        self._chunks.inc(chunks)
        if truncated:
            self._truncated.inc(1)

    def rate_limited(self, limit: str) -> None:
        """See `Telemetry.rate_limited`."""
        self._rate_limited.inc(1, tags={"limit": limit})

    def usage_dropped(self, count: int) -> None:
        """See `Telemetry.usage_dropped`."""
        self._dropped.inc(count)
