"""The Summarizer's spans: of each call, and in it of the times that the engine reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from serve_app.calls import Call, Outcome
from serve_app.engine.protocol import Failed, FailureReason, Finished, FinishReason, Usage
from serve_app.tracing import export

_PROPAGATOR = TraceContextTextMapPropagator()
_FINISH = {FinishReason.STOP: "stop", FinishReason.MAX_NEW_TOKENS: "length"}


class CallSpan:
    """A call in the engine, as it goes on."""

    def __init__(self, span: Span, tracer: trace.Tracer) -> None:
        self._span = span
        self._began_ns = time.time_ns()
        self._tracer = tracer
        self._streamed = False

    def tokens(self) -> None:
        """More of the output has come."""
        if not self._streamed:
            self._streamed = True
            seconds = (time.time_ns() - self._began_ns) / 1e9
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)

    def end(self, outcome: Outcome | None) -> None:
        """The call is over; without an outcome, nobody waited for one. The first end counts."""
        if not self._span.is_recording():
            return
        if isinstance(outcome, Finished | Failed):
            self._spent(outcome.usage)
        if isinstance(outcome, Finished):
            reasons = [_FINISH[outcome.reason]]
            self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
        else:
            kind = "cancelled"
            if outcome is not None:
                kind = outcome.reason.value if isinstance(outcome, Failed) else "overloaded"
            self._span.set_attribute("error.type", kind)
            if kind != FailureReason.CANCELLED.value:
                self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _spent(self, usage: Usage) -> None:
        told: dict[str, AttributeValue] = {
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
        }
        self._span.set_attributes(told)
        within = trace.set_span_in_context(self._span)
        for name, begin_ms, end_ms in _phases(usage):
            begin = self._began_ns + int(begin_ms * 1e6)
            phase = self._tracer.start_span(name, within, start_time=begin)
            phase.end(self._began_ns + int(end_ms * 1e6))


def _phases(usage: Usage) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of what the engine did one after the other, in ms from its arrival."""
    yield "queue", 0.0, usage.queue_ms
    if not usage.compute_ms:
        return
    end = usage.queue_ms + usage.compute_ms
    if usage.encode_ms is None:
        yield "generate", usage.queue_ms, end
    else:
        encoded = usage.queue_ms + usage.encode_ms
        yield "encode", usage.queue_ms, encoded
        yield "decode", encoded, end


class ReplicaTracing:
    """Makes the spans of a Summarizer replica.

    Args:
        provider: where they go; closed by `close`.
        model: name of the model.
    """

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider = provider
        self._model = model
        self._tracer = provider.get_tracer("serve_app.summarizer")

    @contextmanager
    def call(self, call: Call) -> Iterator[CallSpan | None]:
        """The span of a call; None where its trace is not sampled."""
        parent = _PROPAGATOR.extract({"traceparent": call.traceparent})
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "t5-serve",
            "gen_ai.request.model": self._model,
            "gen_ai.request.max_tokens": call.settings.max_new_tokens,
            "t5.num_beams": call.settings.num_beams,
            "t5.request_id": call.request_id,
        }
        span = self._tracer.start_span(
            f"text_completion {self._model}", parent, SpanKind.SERVER, attributes
        )
        if not span.is_recording():
            yield None
            return
        traced = CallSpan(span, self._tracer)
        try:
            yield traced
        finally:
            traced.end(None)

    def close(self) -> None:
        """Deliver what waits and stop."""
        export.close(self._provider)
