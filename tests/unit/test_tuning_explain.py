"""`t5-serve tune explain`: constraints from hand-written series, and where they are read from."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from click.testing import CliRunner

from serve_app.cli.tune import command
from serve_app.tuning.constraints import RULES, View, explain
from serve_app.tuning.readings import READINGS, Readings, Value

CHART = Path(__file__).resolve().parents[2] / "helm" / "t5-summarizer"
# One replica of 64 rows, a quarter taken; the load is what one replica is meant to have.
CALM = {
    "slots": 64, "slots_used": 16, "running": 16, "waiting": 0, "replicas": 1, "target": 1,
    "desired": 1, "load": 16, "aim": 16, "handle_queue": 0, "pending_nodes": 0, "finished": 10,
    "deadline": 0, "rejected": 0, "limited_tokens_per_minute": 0, "limited_concurrent_requests": 0,
}  # fmt: skip
FULL = {"slots_used": 64, "running": 64, "waiting": 30}


def view(window_s: float = 60, settings: dict[str, Any] | None = None, **changed: float) -> View:
    values = {name: Value(value, value, value) for name, value in {**CALM, **changed}.items()}
    return View(Readings(window_s, values, ()), settings or {}, cold_start_s=120)


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("nodes", view(window_s=300, target=3, load=48)),
        ("nodes", view(target=3, load=48, pending_nodes=2)),
        ("cold_start", view(target=3, load=48)),
        ("max_replicas", view(target=4, replicas=4, desired=6, load=96)),
        (
            "max_replicas",
            view(
                settings={"summarizer.autoscaling_config.max_replicas": 4},
                target=4, replicas=4, desired=4, load=96,
            ),
        ),
        ("upscale_delay", view(load=40)),
        ("look_back", view(running=50, slots_used=50)),
        ("max_ongoing_requests", view(handle_queue=40, aim=60, running=10)),
        ("target_ongoing_requests", view(**FULL, aim=100, load=94)),
        ("slots", view(**FULL, aim=100, load=94,
                       settings={"summarizer.autoscaling_config.max_replicas": 1})),
        ("engine_queue", view(rejected=2)),
        ("deadline", view(deadline=1)),
        ("rate_limit_tokens", view(limited_tokens_per_minute=3)),
        ("rate_limit_concurrent", view(limited_concurrent_requests=3)),
        ("downscale_delay", view(target=4, replicas=4, desired=4)),
    ],
)  # fmt: skip
def test_each_constraint_binds_where_its_figures_say_so(name: str, seen: View) -> None:
    found = explain(seen).binding
    assert found is not None
    assert found.constraint == name


def test_nothing_binds_a_calm_service_and_every_constraint_was_judged() -> None:
    explained = explain(view())
    assert (explained.binding, explained.others, explained.undecided) == (None, (), {})


def test_a_constraint_that_comes_and_goes_within_the_window_does_not_bind() -> None:
    calm = view(**FULL, aim=100, load=94)
    calm.readings.values["waiting"] = Value(30, 0, 30)  # type: ignore[index]
    assert explain(calm).binding is None


def test_the_knob_has_its_current_value_and_the_reason_its_figures() -> None:
    path = "summarizer.autoscaling_config.max_replicas"
    found = explain(view(settings={path: 4}, target=4, replicas=4, load=96)).binding
    assert found is not None
    assert (found.knob, found.current) == (path, 4)
    assert "96 requests" in found.why
    assert "6.0 replicas" in found.why


def test_what_cannot_be_told_is_not_nothing() -> None:
    seen = view()
    values = {name: value for name, value in seen.readings.values.items() if name != "load"}
    explained = explain(View(Readings(60, values, ("ray_serve_autoscaling_total_requests",))))
    assert explained.binding is None
    assert explained.undecided["upscale_delay"] == "load"
    assert "slots" not in explained.undecided


def test_every_rule_can_be_judged_from_the_table() -> None:
    assert {one.name for one in READINGS} == set(CALM)


def test_every_knob_is_a_value_of_the_chart() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    for rule in RULES:
        assert rule.knob is not None
        at = values
        for part in rule.knob.split("."):
            assert part in at, rule.knob
            at = at[part]


Answer = Any


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """HTTP with the given answers: `(path, query) -> text`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            content = answer(parts.path, parse_qs(parts.query)).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as one:
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{one.server_port}"
        one.shutdown()


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(command, ["explain", *args], standalone_mode=False)
    said = str(result.exception) if result.exception else ""
    return (result.return_value if result.exception is None else 2), result.output, said


PAGE = """\
ray_t5_slots{{replica="a"}} 64
ray_t5_slots{{replica="b"}} 64
ray_t5_slots_used{{replica="a"}} 64
ray_t5_slots_used{{replica="b"}} 64
ray_t5_running_requests{{replica="a"}} 128
ray_t5_waiting_requests{{replica="a"}} 9
ray_t5_engine_requests_total{{outcome="finished"}} {finished}
ray_serve_deployment_replica_healthy{{deployment="Summarizer",replica="a"}} 1
ray_serve_deployment_replica_healthy{{deployment="Summarizer",replica="b"}} 1
ray_serve_deployment_replica_healthy{{deployment="Api",replica="c"}} 1
ray_serve_autoscaling_target_replicas{{deployment="Summarizer"}} 2
ray_serve_autoscaling_desired_replicas{{deployment="Summarizer"}} 3
ray_serve_autoscaling_total_requests{{deployment="Summarizer"}} 137
ray_serve_autoscaling_target_ongoing_requests{{deployment="Summarizer"}} 32
ray_serve_deployment_queued_queries{{deployment="Summarizer"}} 0
"""


def test_pages_are_read_twice_and_counters_become_rates() -> None:
    turns = iter([100, 110])
    with server(lambda *_: PAGE.format(finished=next(turns))) as url:
        code, out, _ = run("--metrics", f"{url}/metrics", "--window", "1", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["binding"]["constraint"] == "max_replicas"
    assert told["binding"]["knob"] == "summarizer.autoscaling_config.max_replicas"
    assert told["readings"]["replicas"]["now"] == 2
    assert told["readings"]["finished"]["now"] == pytest.approx(10 / told["window_s"])


def test_the_dashboard_tells_current_values() -> None:
    details = {
        "applications": {
            "t5-serve": {
                "deployments": {
                    "Summarizer": {
                        "target_num_replicas": 2,
                        "replicas": [{"state": "RUNNING"}, {"state": "RUNNING"}],
                        "deployment_config": {
                            "max_ongoing_requests": 1024,
                            "autoscaling_config": {"max_replicas": 2},
                        },
                    }
                }
            }
        }
    }

    def answer(path: str, _: object) -> str:
        return json.dumps(details) if "applications" in path else PAGE.format(finished=1)

    with server(answer) as url:
        code, out, _ = run("--metrics", f"{url}/metrics", "--window", "1", "--dashboard", url)
    assert code == 0
    assert "binding: max_replicas" in out
    assert "max_replicas (now 2)" in out


def test_a_prometheus_is_asked_with_the_labels_of_the_service() -> None:
    asked: list[str] = []

    def answer(path: str, query: dict[str, list[str]]) -> str:
        [expr] = query["query"]
        asked.append(expr)
        values: dict[str, Any] = {"values": [[0, "1"], [5, "3"], [9, "2"]], "value": [0, "4"]}
        data = {"result": [] if "autoscaler_pending" in expr else [values]}
        return json.dumps({"status": "success", "data": data})

    with server(answer) as url:
        code, out, _ = run("--prometheus", url, "--label", "namespace=t5", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["readings"]["slots"] == {"now": 2, "low": 1, "high": 3}
    assert told["readings"]["finished"]["now"] == 4
    assert told["readings"]["pending_nodes"]["now"] == 0
    assert 'sum(ray_t5_slots{namespace="t5"})' in asked
    assert len(asked) == len(READINGS)


def test_missing_series_are_named_with_what_to_do() -> None:
    with server(lambda *_: "other 1\n") as url:
        code, out, _ = run("--metrics", f"{url}/metrics", "--window", "1")
    assert code == 1
    assert "binding: cannot be told" in out
    assert "missing: ray_t5_slots\n" in out
    assert "missing: ray_serve_autoscaling_total_requests\n" in out
    assert "metrics.podMonitor.enabled" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give --prometheus or --metrics: one of them"),
        (["--metrics", "http://x/", "--prometheus", "http://x/"], "one of them"),
        (["--prometheus", "http://127.0.0.1:9/"], "http://127.0.0.1:9/api/v1/query_range: "),
        (["--prometheus", "http://x", "--label", "namespace"], "--label namespace: must be NAME="),
        (["--metrics", "http://127.0.0.1:9/", "--label", "a=b"], "--label goes with --prometheus"),
    ],
)
def test_wrong_options_and_sources_are_one_line(args: list[str], message: str) -> None:
    code, _, said = run(*args)
    assert code == 2
    assert message in said
    assert "\n" not in said
