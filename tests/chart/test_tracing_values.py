"""What the values of traces make of the pods."""

from __future__ import annotations

from collections.abc import Callable

from ray._common.utils import import_attr

from tests.chart.conftest import Object, Rendered

Render = Callable[..., Rendered]
COLLECTOR = "http://collector.observability:4318"


def environment(release: Rendered, pod: str) -> dict[str, str]:
    [container] = release.pod(pod)["containers"]
    return {one["name"]: one.get("value", "") for one in container["env"]}


def test_traces_are_off(render: Render) -> None:
    assert "endpoint" not in render().arguments["tracing"]


def test_serve_traces_only_if_wanted(render: Render) -> None:
    tracing: Object = {"endpoint": COLLECTOR, "sample_ratio": 0.5}
    for pod in ("head", "api", "summarizer"):
        quiet = environment(render({"tracing": tracing}), pod)
        assert not [name for name in quiet if "TRACING" in name or "OTEL" in name]
        found = environment(render({"tracing": {**tracing, "serveSpans": True}}), pod)
        assert found["OTEL_EXPORTER_OTLP_ENDPOINT"] == COLLECTOR
        assert found["RAY_SERVE_TRACING_SAMPLING_RATIO"] == "0.5"
        # Serve imports it by this path, and calls it without arguments.
        assert callable(import_attr(found["RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"]))


def test_serves_spans_need_a_collector(refuse: Callable[..., str]) -> None:
    said = refuse({"tracing": {"serveSpans": True}})
    assert "tracing.endpoint: must be set with tracing.serveSpans, is null" in said
