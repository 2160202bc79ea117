"""Where spans go: to a collector, by OTLP over HTTP, off the request path, bounded, counted."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

import serve_app
from serve_app.config import TracingSettings

EXPORT_S = 5.0  # for one batch, repetitions included
_CLOSE_S = 5.0
_DELAY_MS = 2_000  # longest wait for a batch to fill: what a killed replica loses
_BATCH = 512  # spans


class BoundedExport(SpanProcessor):
    """Hands ended spans to an exporter's thread.

    A span that finds the queue full, or whose batch could not be delivered, is dropped and counted:
    the SDK's own processor drops the oldest without telling how many.

    Args:
        exporter: called on a thread of its own.
        queue_size: spans that may wait, those of the batch being sent not among them.
        on_drop: told how many spans were just dropped, from any thread.
    """

    def __init__(
        self, exporter: SpanExporter, queue_size: int, on_drop: Callable[[int], None]
    ) -> None:
        self._queue_size = queue_size
        self._on_drop = on_drop
        self._lock = threading.Lock()
        self._waiting = 0
        self._batches = BatchSpanProcessor(
            _Counted(exporter, self._left, on_drop),
            max_queue_size=queue_size,
            schedule_delay_millis=_DELAY_MS,
            max_export_batch_size=min(_BATCH, queue_size),
        )

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span; never blocks."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        with self._lock:
            full = self._waiting >= self._queue_size
            if not full:
                self._waiting += 1
        if full:
            self._on_drop(1)
        else:
            self._batches.on_end(span)

    def shutdown(self) -> None:
        """Deliver what waits, then stop."""
        self._batches.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Deliver what waits."""
        return self._batches.force_flush(timeout_millis)

    def _left(self, count: int) -> None:
        with self._lock:
            self._waiting -= count


class _Counted(SpanExporter):
    """Tells when spans leave the queue, and how many could not be delivered."""

    def __init__(
        self,
        exporter: SpanExporter,
        on_left: Callable[[int], None],
        on_drop: Callable[[int], None],
    ) -> None:
        self._exporter = exporter
        self._on_left = on_left
        self._on_drop = on_drop

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._on_left(len(spans))
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self._on_drop(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def make_provider(
    settings: TracingSettings, service: str, instance: str, on_drop: Callable[[int], None]
) -> TracerProvider:
    """A provider of tracers whose spans go to `settings.endpoint`, which must be set.

    `OTEL_EXPORTER_OTLP_HEADERS` (a key for the collector), `OTEL_EXPORTER_OTLP_CERTIFICATE` and
    `OTEL_RESOURCE_ATTRIBUTES` of the environment count, too.

    Args:
        settings: endpoint, sampling, queue.
        service: `service.name`.
        instance: `service.instance.id`.
        on_drop: told how many spans were just dropped, from any thread.
    """
    if settings.endpoint is None:
        raise ValueError("tracing.endpoint: must be set")
    exporter = OTLPSpanExporter(
        endpoint=f"{settings.endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_S
    )
    resource = Resource.create(
        {
            "service.name": service,
            "service.version": serve_app.__version__,
            "service.instance.id": instance,
            "host.name": platform.node(),
        }
    )
    provider = TracerProvider(
        # A caller's decision counts; the ratio is for requests that come without one.
        sampler=ParentBasedTraceIdRatio(settings.sample_ratio),
        resource=resource,
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BoundedExport(exporter, settings.queue_size, on_drop))
    return provider


def close(provider: TracerProvider) -> None:
    """Deliver what waits and stop. Takes a few seconds at most: the collector may be down."""
    closing = threading.Thread(target=provider.shutdown, name="tracing-close", daemon=True)
    closing.start()
    closing.join(_CLOSE_S)
