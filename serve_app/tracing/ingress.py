"""The Api's spans: one of each request, and one of each call that it makes to the Summarizer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from serve_app.calls import Call
from serve_app.errors import ServiceError
from serve_app.tracing import export

_PROPAGATOR = TraceContextTextMapPropagator()
_PROBES = ("/healthz", "/readyz")
# HTTP semantic conventions: other methods are `_OTHER`, as they may be anything.
_METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
)
# Fields of the usage event that a span has as well, and their names there.
_NAMES = {
    "route": "http.route",
    "status": "http.response.status_code",
    "request_bytes": "http.request.body.size",
    "response_bytes": "http.response.body.size",
    "request_id": "t5.request_id",
    "client": "enduser.id",
    "error_type": "error.type",
    "model": "gen_ai.request.model",
    "max_new_tokens": "gen_ai.request.max_tokens",
    "stream": "gen_ai.request.stream",
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "num_beams": "t5.num_beams",
    "texts": "t5.texts",
    "chunks": "t5.chunks",
    "truncated": "t5.truncated",
    "on_overflow": "t5.on_overflow",
}


class RequestSpan:
    """The span of a request that is being answered; current until `end`."""

    def __init__(self, span: Span, method: str) -> None:
        self._span = span
        self._method = method
        self._token = contexts.attach(trace.set_span_in_context(span))
        self.traceparent = _traceparent(span)

    def end(self, event: Mapping[str, Any]) -> None:
        """The request has been answered; `event` is its usage event."""
        contexts.detach(self._token)
        if self._span.is_recording():
            self._describe(event)
        self._span.end()

    def _describe(self, event: Mapping[str, Any]) -> None:
        status, route = int(event["status"]), str(event["route"])
        told = {_NAMES[name]: value for name, value in event.items() if name in _NAMES}
        self._span.set_attributes(told)
        if route != "unmatched":
            self._span.update_name(f"{self._method} {route}")
        error = event.get("error_type")
        # Not the service's errors: what the client did wrong, and a client that has left.
        broken_stream = status < 400 and error not in (None, "client-closed")
        if broken_stream or status >= 500:
            self._span.set_status(StatusCode.ERROR)
            self._span.set_attribute("error.type", error or str(status))


class IngressTracing:
    """Makes the spans of an Api replica.

    Args:
        provider: where they go; closed by `close`.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("serve_app.api")

    def request(self, scope: Scope) -> RequestSpan | None:
        """Begin the span of a request; None for health probes, of which there are too many.

        Its parent is the `traceparent` it came with, or Serve's own span, where Serve traces.
        """
        if scope["path"].endswith(_PROBES):
            return None
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        # No `url.path` and no query: a client can write anything there.
        attributes = {"http.request.method": method, "url.scheme": scope.get("scheme", "http")}
        name = "HTTP" if method == "_OTHER" else method
        span = self._tracer.start_span(name, _parent(scope), SpanKind.SERVER, attributes)
        return RequestSpan(span, name)

    @contextmanager
    def call(self, call: Call) -> Iterator[Call]:
        """The span of one call to the Summarizer; what it gives carries the span's context.

        Does not become current, so that it may surround the `yield`s of a generator.
        """
        span = self._tracer.start_span(f"summarize {call.stage}", kind=SpanKind.CLIENT)
        try:
            yield replace(call, traceparent=_traceparent(span))
        except (asyncio.CancelledError, GeneratorExit):
            span.set_attribute("error.type", "cancelled")  # nobody waits any more: no error
            raise
        except BaseException as error:
            kind = error.kind if isinstance(error, ServiceError) else type(error).__name__
            span.set_attribute("error.type", kind)
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Deliver what waits and stop."""
        export.close(self._provider)


def _parent(scope: Scope) -> contexts.Context | None:
    current = trace.get_current_span().get_span_context()
    if current.is_valid:
        return None  # the current context
    return _PROPAGATOR.extract(Headers(scope=scope))


def _traceparent(span: Span) -> str:
    context = span.get_span_context()
    trace_id = trace.format_trace_id(context.trace_id)
    span_id = trace.format_span_id(context.span_id)
    return f"00-{trace_id}-{span_id}-{context.trace_flags:02x}"
