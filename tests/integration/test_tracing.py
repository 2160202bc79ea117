"""Spans of a real service, at a collector that decodes OpenTelemetry's own protobufs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.usage.folder import segments
from tests.integration.conftest import Deploy, Service, until
from tests.otlp import Collector, Span, collector
from tests.texts import long_text, texts

TEXT = texts(1)[0]
CALLER = "00f067aa0ba902b7"


@dataclass(frozen=True)
class Traced:
    """A service, where its spans go and where its usage events are."""

    service: Service
    collector: Collector
    usage: Path

    def post(self, trace: str, body: Any, path: str = "/v1/summarize") -> httpx.Response:
        headers = {"traceparent": f"00-{trace}-{CALLER}-01", "X-Request-Id": f"r-{trace[-4:]}"}
        return self.service.post(path, body, headers=headers)

    def tree(self, trace: str) -> Tree:
        """The whole tree of a request: its own span ends last, and then it is sent."""

        def whole() -> list[Span]:
            spans = self.collector.spans(trace)
            # A call that was given up need not have reached the Summarizer.
            calls = [s for s in spans if s.kind == "client" and "error.type" not in s.attributes]
            served = {span.parent for span in spans if span.service == "t5-serve-summarizer"}
            complete = all(call.id in served for call in calls)
            return spans if complete and any(s.parent == CALLER for s in spans) else []

        return Tree(until(whole, "the spans arrived"))

    def event(self, **wanted: Any) -> dict[str, Any]:
        """The usage event with these fields."""

        def find() -> dict[str, Any] | None:
            lines = [json.loads(x) for path in segments(self.usage) for x in path.open()]
            return next((x for x in lines if wanted.items() <= x.items()), None)

        return until(find, "the usage event was written")


class Tree:
    """Spans of one trace."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans
        [self.root] = [span for span in spans if span.parent == CALLER]

    def below(self, span: Span) -> list[Span]:
        return [other for other in self.spans if other.parent == span.id]

    def shape(self, span: Span) -> Any:
        """Names from a span down."""
        return span.name, [self.shape(child) for child in self.below(span)]


@pytest.fixture(scope="module")
def traced(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    usage = tmp_path_factory.mktemp("traced")
    with collector() as taken:
        service = deploy(
            "traced",
            "/traced",
            tracing={"endpoint": taken.url},
            usage={"folder": str(usage)},
            model={"name": "demo", "max_input_tokens": 96},
            engine={"max_waiting_requests": 8},
        )
        yield Traced(service, taken, usage)


CALL = ("text_completion demo", [("queue", []), ("encode", []), ("decode", [])])


def test_the_spans_of_a_request(traced: Traced) -> None:
    trace = f"{1:032x}"
    answer = traced.post(trace, {"text": TEXT, "max_new_tokens": 20})
    usage = answer.json()["usage"]
    tree = traced.tree(trace)
    assert tree.shape(tree.root) == ("POST /v1/summarize", [("summarize final", [CALL])])
    assert [(s.service, s.kind, s.failed) for s in tree.spans] == [
        ("t5-serve-api", "server", False),
        ("t5-serve-api", "client", False),
        ("t5-serve-summarizer", "server", False),
        *[("t5-serve-summarizer", "internal", False)] * 3,
    ]
    told = tree.root.attributes
    assert told["http.request.method"] == "POST"
    assert told["http.route"] == "/v1/summarize"
    assert told["http.response.status_code"] == 200
    assert told["enduser.id"] == "tester"
    assert told["t5.request_id"] == "r-0001"
    [call] = tree.below(tree.root)
    [engine] = tree.below(call)
    for span in (tree.root, engine):
        assert span.attributes["gen_ai.request.model"] == "demo"
        assert span.attributes["gen_ai.request.max_tokens"] == 20
        assert span.attributes["gen_ai.usage.input_tokens"] == usage["input_tokens"]
        assert span.attributes["gen_ai.usage.output_tokens"] == usage["output_tokens"]
    assert engine.attributes["gen_ai.response.finish_reasons"] in (["stop"], ["length"])
    # The engine's times, one after the other, within the call, and as the answer has them.
    queue, encode, decode = tree.below(engine)
    assert tree.root.begin <= call.begin <= engine.begin <= queue.begin
    assert abs(encode.begin - queue.end) <= 1
    assert abs(decode.begin - encode.end) <= 1
    assert decode.end <= engine.end
    assert call.end <= tree.root.end
    assert (queue.end - queue.begin) / 1e6 == pytest.approx(usage["queue_ms"], abs=0.01)
    assert (decode.end - encode.begin) / 1e6 == pytest.approx(usage["compute_ms"], abs=0.01)
    assert encode.begin < encode.end < decode.end


def test_a_long_text_has_a_call_for_each_part(traced: Traced) -> None:
    trace = f"{2:032x}"
    answer = traced.post(trace, {"text": long_text(200)}).json()
    assert len(answer["chunks"]) > 2
    tree = traced.tree(trace)
    names = [span.name for span in tree.below(tree.root)]
    parts = len(answer["chunks"])
    assert names == ["summarize map"] * parts + ["summarize final"]
    assert all(tree.shape(call)[1] == [CALL] for call in tree.below(tree.root))
    final = tree.below(tree.root)[-1]
    assert all(call.end <= final.begin for call in tree.below(tree.root)[:-1])
    assert tree.root.attributes["t5.chunks"] == parts


def test_a_stream(traced: Traced) -> None:
    trace = f"{3:032x}"
    answer = traced.post(trace, {"text": TEXT, "stream": True})
    assert "event: done" in answer.text
    tree = traced.tree(trace)
    assert tree.shape(tree.root) == ("POST /v1/summarize", [("summarize final", [CALL])])
    assert not any(span.failed for span in tree.spans)
    [engine] = [span for span in tree.spans if span.name == "text_completion demo"]
    first = engine.attributes["gen_ai.response.time_to_first_chunk"]
    assert 0 < first < (engine.end - engine.begin) / 1e9
    assert tree.root.attributes["gen_ai.request.stream"] is True


def test_calls_that_find_the_queue_full(traced: Traced) -> None:
    trace = f"{4:032x}"
    answer = traced.post(trace, {"texts": [long_text(50)] * 64}, "/v1/summarize/batch")
    refused = [item for item in answer.json()["results"] if "error" in item]
    assert refused, "64 texts at once should not fit into a queue of 8"

    def all_failed() -> Tree | None:
        tree = traced.tree(trace)
        failed = [call for call in tree.below(tree.root) if call.failed]
        return tree if all(tree.below(call) for call in failed) else None

    tree = until(all_failed, "the Summarizer's spans of them arrived")
    failed = [call for call in tree.below(tree.root) if call.failed]
    assert len(failed) == len(refused)
    for call in failed:
        assert call.attributes["error.type"] == "overloaded"
        [engine] = tree.below(call)
        assert engine.failed
        assert engine.attributes["error.type"] == "overloaded"
        assert tree.below(engine) == []
    # Each text has its own answer; the request did not fail.
    assert not tree.root.failed


def test_calls_whose_deadline_passed(traced: Traced) -> None:
    trace = f"{5:032x}"
    answer = traced.post(trace, {"text": long_text(3000), "timeout_s": 0.3})
    assert answer.status_code in (408, 503)
    tree = traced.tree(trace)
    assert tree.root.attributes["error.type"] in ("deadline", "overloaded")
    given_up = [s for s in tree.spans if s.attributes.get("error.type") == "cancelled"]
    assert given_up
    assert not any(span.failed for span in given_up)


def test_what_is_wrong_with_a_request_is_not_the_services_failure(traced: Traced) -> None:
    trace = f"{6:032x}"
    assert traced.post(trace, {"text": ""}).status_code == 422
    tree = traced.tree(trace)
    assert tree.shape(tree.root) == ("POST /v1/summarize", [])
    assert tree.root.attributes["error.type"] == "invalid"
    assert not tree.root.failed


def test_the_trace_of_a_usage_event_is_that_of_the_spans(traced: Traced) -> None:
    # Without a traceparent the service begins the trace.
    headers = {"X-Request-Id": "own-trace"}
    traced.service.post("/v1/summarize", {"text": TEXT}, headers=headers)
    trace = traced.event(request_id="own-trace")["trace_id"]

    def find() -> Span | None:
        return next((span for span in traced.collector.spans(trace) if not span.parent), None)

    root = until(find, "the span arrived")
    assert root.attributes["t5.request_id"] == "own-trace"
    assert traced.event(request_id="r-0001")["trace_id"] == f"{1:032x}"


def test_a_caller_that_does_not_sample_is_not_sampled(traced: Traced) -> None:
    trace = f"{7:032x}"
    headers = {"traceparent": f"00-{trace}-{CALLER}-00", "X-Request-Id": "unsampled"}
    traced.service.post("/v1/summarize", {"text": TEXT}, headers=headers)
    assert traced.event(request_id="unsampled")["trace_id"] == trace
    traced.post(f"{8:032x}", {"text": TEXT})
    traced.tree(f"{8:032x}")  # what came later has arrived
    assert traced.collector.spans(trace) == []


def test_no_span_has_a_text_a_token_or_a_path(traced: Traced) -> None:
    trace, secret = f"{9:032x}", "Zanzibar"
    summary = traced.post(trace, {"text": f"{secret} is an island. {TEXT}"}).json()["summary"]
    traced.tree(trace)
    traced.post(f"{10:032x}", None, f"/{secret}?{secret}={secret}")
    tree = traced.tree(f"{10:032x}")
    assert (tree.root.name, tree.root.attributes["http.route"]) == ("POST", "unmatched")
    for said in (secret, traced.service.token, summary, *TEXT.split(". ")):
        assert said
        assert said.encode() not in traced.collector.bodies


def test_no_request_waits_for_a_collector_that_is_down(traced: Traced) -> None:
    def dropped() -> float:
        return traced.service.cluster.series("ray_t5_spans_dropped_total", application="traced")

    before, trace = dropped(), f"{11:032x}"
    traced.collector.status = 500
    try:
        for _ in range(3):
            assert traced.post(trace, {"text": TEXT}).status_code == 200
        # A request has 6 spans: 2 of the Api, 4 of the Summarizer.
        until(lambda: dropped() - before == 18, "18 spans were dropped and counted")
    finally:
        traced.collector.status = 200
    assert traced.collector.spans(trace) == []
    traced.post(f"{12:032x}", {"text": TEXT})
    assert len(traced.tree(f"{12:032x}").spans) == 6
