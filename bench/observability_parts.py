"""CPU time of what observing adds to a request, by part: `python -m bench.observability_parts`.

The same objects as in the replicas, in one process, with a collector that takes the spans. CPU time
of all threads, so what writes and sends in the background counts, and so does the collector's own
work. Other work on the machine hardly moves these figures, unlike those of `bench.observability`.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

from bench.observability import Collector
from serve_app.calls import Call
from serve_app.config import TracingSettings
from serve_app.engine.protocol import Finished, FinishReason, GenerationSettings, Usage
from serve_app.tracing.export import make_provider
from serve_app.tracing.ingress import IngressTracing
from serve_app.tracing.replica import ReplicaTracing
from serve_app.usage.events import usage_event
from serve_app.usage.writer import UsageWriter

_REQUESTS, _REPEATS = 3_000, 7
_QUEUE = 10 * _REQUESTS  # nothing is dropped
_CALL = Call("c", [1] * 40, GenerationSettings(), 10.0, "shop")
_FINISHED = Finished("c", [1] * 8, FinishReason.STOP, Usage(40, 8, 0.2, 30.0, 10.0))
_SCOPE = {"type": "http", "path": "/v1/summarize", "method": "POST", "headers": []}


def microseconds(request: Callable[[], None], finish: Callable[[], object]) -> float:
    """CPU time of a request; the median of some repeats. `finish` waits for the background."""
    found = []
    for _ in range(_REPEATS):
        began = time.process_time_ns()
        for _ in range(_REQUESTS):
            request()
        finish()
        found.append((time.process_time_ns() - began) / _REQUESTS / 1e3)
    return statistics.median(found)


def usage_events() -> float:
    """An event made, queued and written."""
    with tempfile.TemporaryDirectory() as folder:
        written = threading.Semaphore(0)

        class Writer(UsageWriter):
            def _append(self, lines: bytes) -> None:
                super()._append(lines)
                written.release(lines.count(b"\n"))

        writer = Writer(Path(folder), max_bytes=1 << 24, keep=4, queue_size=_QUEUE)

        def finish() -> None:
            for _ in range(_REQUESTS):
                written.acquire()

        try:
            return microseconds(lambda: writer.record(_event()), finish)
        finally:
            writer.close()


def spans(ratio: float) -> float:
    """The six spans of a request with one call, made, queued and sent."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = TracingSettings(
        endpoint=f"http://127.0.0.1:{server.server_port}", sample_ratio=ratio, queue_size=_QUEUE
    )
    provider = make_provider(settings, "bench", "bench", _dropped)
    ingress, replica = IngressTracing(provider), ReplicaTracing(provider, "demo")
    event = _event()

    def request() -> None:
        span = ingress.request(_SCOPE)
        assert span is not None
        with ingress.call(_CALL) as call, replica.call(call) as traced:
            if traced is not None:
                traced.end(_FINISHED)
        span.end(event)

    try:
        return microseconds(request, provider.force_flush)
    finally:
        provider.shutdown()
        server.shutdown()


def _event() -> dict[str, object]:
    facts = {
        "client": "shop",
        "model": "demo",
        "model_revision": "0eb59d090d70",
        "num_beams": 1,
        "max_new_tokens": 64,
        "on_overflow": "map_reduce",
        "stream": False,
        "texts": 1,
        "characters": 200,
        "input_tokens": 40,
        "output_tokens": 8,
        "chunks": 1,
        "truncated": 0,
        "cached": 0,
        "queue_ms": 0.2,
        "compute_ms": 30.0,
    }
    return usage_event(
        request_id="0123456789abcdef",
        traceparent="",
        method="POST",
        route="/v1/summarize",
        status=200,
        total_ms=31.5,
        request_bytes=200,
        response_bytes=300,
        facts=facts,
    )


def _dropped(count: int) -> None:
    raise AssertionError(f"{count} spans were dropped")


def main() -> None:
    """Print a Markdown table."""
    print("| part | CPU us per request |\n|---|---|")
    print(f"| usage event | {usage_events():.0f} |")
    for ratio in (0, 0.1, 1):
        print(f"| spans, sample ratio {ratio} | {spans(ratio):.0f} |")


if __name__ == "__main__":
    main()
