"""Tracing inside of Ray Serve: the spans of our own replicas, and those that Serve itself makes."""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from ray import serve
from ray.serve import metrics

from serve_app.config import TracingSettings
from serve_app.metrics.series import SPANS_DROPPED
from serve_app.tracing.export import EXPORT_S, BoundedExport, make_provider


def provider_of_replica(settings: TracingSettings, service: str) -> TracerProvider:
    """A provider for the replica that this runs in. `service` is OpenTelemetry's `service.name`."""
    replica = serve.get_replica_context().replica_id.unique_id
    return make_provider(settings, service, replica, _count_drops())


def span_processors() -> list[SpanProcessor]:
    """For Serve's own `tracing_config.exporter_import_path`: its spans to the same collector.

    It takes no arguments, so the collector is `OTEL_EXPORTER_OTLP_ENDPOINT` of the environment.
    """
    queue_size: int = TracingSettings.model_fields["queue_size"].default
    return [BoundedExport(OTLPSpanExporter(timeout=EXPORT_S), queue_size, _count_drops())]


def _count_drops() -> Callable[[int], None]:
    return metrics.Counter(SPANS_DROPPED.name, description=SPANS_DROPPED.text).inc
