"""Spans leave the request path at once, whatever becomes of them; when off, nothing is imported."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from pydantic import ValidationError

from serve_app.config import ServiceSettings
from serve_app.tracing.export import BoundedExport


class Slow(SpanExporter):
    """A collector that answers when it is let, and what it was sent."""

    def __init__(self, result: SpanExportResult = SpanExportResult.SUCCESS) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.sent: list[str] = []
        self._result = result

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.begun.set()
        assert self.go_on.wait(60)
        self.sent += [span.name for span in spans]
        return self._result


def test_spans_beyond_the_queue_are_dropped_and_counted() -> None:
    drops: list[int] = []
    collector = Slow()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BoundedExport(collector, 3, drops.append))
    tracer = provider.get_tracer("test")
    for name in "abc":  # a batch: taken, and kept from being sent
        tracer.start_span(name).end()
    assert collector.begun.wait(60)
    for name in "defghi":
        tracer.start_span(name).end()
    collector.go_on.set()
    provider.shutdown()
    assert sorted(collector.sent) == ["a", "b", "c", "d", "e", "f"]
    assert sum(drops) == 3


def test_a_batch_that_is_refused_is_counted() -> None:
    drops: list[int] = []
    collector = Slow(SpanExportResult.FAILURE)
    collector.go_on.set()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BoundedExport(collector, 100, drops.append))
    for name in "abc":
        provider.get_tracer("test").start_span(name).end()
    provider.shutdown()
    assert sum(drops) == 3


def test_without_tracing_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, serve_app.app, serve_app.summarizer, serve_app.api.deployment\n"
        "print([m for m in sys.modules if m.startswith(('serve_app.tracing',"
        " 'opentelemetry.exporter.otlp'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", ""])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    with pytest.raises(ValidationError, match=r"tracing\.endpoint"):
        ServiceSettings.model_validate({"tracing": {"endpoint": endpoint}})


def test_a_string_is_the_endpoint() -> None:
    url = "http://collector:4318"
    assert ServiceSettings.model_validate({"tracing": url}).tracing.endpoint == url
    assert ServiceSettings().tracing.endpoint is None
