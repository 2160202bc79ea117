"""`t5-serve tune verify`: comparisons of hand-made figures, replays against a known server."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from serve_app.cli.tune import command
from serve_app.tuning.compare import Steps, calibrated, compare, distance, simulations, sizes
from serve_app.tuning.measured import measure
from serve_app.tuning.model import Decode, Encode, Platform, Scaling, ServiceModel
from serve_app.tuning.replay import Answers, Plan, Probed, Replayed, Watched
from serve_app.tuning.send import OK, Run, Sent
from serve_app.tuning.verify_report import page

# A request of 10 steps takes 0.1 s in the engine, however many there are, and 0.02 s outside it.
MODEL = ServiceModel(
    encode=Encode(token_s=0), decode=Decode(step_s=0.01, row_s=0), overhead_s=0.02, rows=64
)


def plan(count: int, seconds: float, words: int = 30, out: int = 10) -> Plan:
    at = np.linspace(0, seconds, count, endpoint=False)
    same = np.ones(count, dtype=np.int64)
    return Plan(at, seconds, same * words, same * out, same, seed=1, deadline_s=30)


def replayed(load: Plan, latency_s: float, running: list[int]) -> Replayed:
    """As if every request had taken so long, and replicas had been seen each second."""
    run = Run(
        [Sent(due, due, due + latency_s, OK) for due in load.at.tolist()], wall_s=load.duration_s
    )
    answers = Answers.of(len(load.at))
    answers.input_tokens[:], answers.output_tokens[:] = 40, load.out
    watched = Watched([float(at) for at in range(len(running))], running, running)
    return Replayed(run, answers, watched)


def test_the_distance_of_timelines_is_the_mean_area_between_them() -> None:
    # From 2 to 6 of 10 seconds the one has 2 more, from 6 to 7 one more.
    one, other = Steps([0, 2, 6], [1, 3, 2]), Steps([0, 7], [1, 2])
    assert distance(one, other, 10) == pytest.approx((2 * 4 + 1 * 1) / 10)
    assert distance(one, one, 10) == 0
    # What is seen first holds from the beginning.
    assert distance(Steps([0.4], [1]), Steps([0], [1]), 10) == 0


def test_a_start_lasts_from_the_risen_target_until_as_many_run() -> None:
    watched = Watched([0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 2, 2, 1, 2, 1, 1], [1, 1, 1, 2, 1, 1, 1, 1])
    # The second one was called off.
    assert watched.starts_s() == [2]


def test_a_probe_gives_what_is_outside_the_engine_and_how_fast_that_is() -> None:
    load = plan(5, 5)
    answers = Answers.of(5)
    answers.input_tokens[:], answers.output_tokens[:] = 40, 10
    answers.queue_s[:], answers.compute_s[:] = 0.01, 0.2
    fitted, slower = calibrated(MODEL, load, Probed(np.full(5, 0.25), answers, 0.04))
    assert slower == pytest.approx(2)
    assert fitted.decode.step_s == pytest.approx(0.02)
    assert fitted.overhead_s == 0.04
    assert fitted.rows == MODEL.rows


def test_sizes_are_those_of_the_answers_and_the_median_where_there_is_none() -> None:
    load = plan(4, 4)
    answers = Answers.of(4)
    answers.input_tokens[:] = [30, math.nan, 50, 900]
    answers.output_tokens[:] = [10, math.nan, 9, 10]
    tokens, steps = sizes(load, answers, most_tokens=512)
    assert tokens.tolist() == [30, 50, 50, 512]
    assert steps.tolist() == [10, 10, 9, 10]


def test_both_sides_have_the_same_requests_and_the_errors_are_what_they_are_called() -> None:
    load = plan(100, 20)
    live = replayed(load, 0.1, [1] * 10 + [2] * 10)
    scaling = Scaling(max_replicas=1, look_back_period_s=10)
    tokens, steps = sizes(load, live.answers, 512)
    simulated = list(simulations(load, tokens, steps, MODEL, scaling, Platform(), 0.11))
    found = compare("one", load, live, measure(live.run, 20, 0.11, 0.1), simulated, 0.02)
    assert found.live.requests == found.simulated.requests == 100
    # Simulated they take 0.12 s, histograms being exact to half a per cent; live 0.1.
    assert found.p50_error == pytest.approx(0.2, abs=0.01)
    assert found.p95_error == pytest.approx(0.2, abs=0.02)
    assert (found.live.attainment, found.simulated.attainment) == (1, 0)
    assert found.attainment_error == -1
    assert found.live.goodput == pytest.approx(5)
    assert found.live.wait_s is None  # these answers do not tell
    assert found.simulated.wait_s == pytest.approx(0, abs=1e-6)
    assert found.simulated.engine_s == pytest.approx(0.1)
    assert found.live.replicas_mean == pytest.approx(1.5)
    assert found.simulated.replicas_mean == 1
    assert found.timeline_distance == pytest.approx(0.5)
    assert found.missed(0.3, 0.6) == []
    assert [said.split()[0] for said in found.missed(0.1, 0.4)] == ["p95", "replicas"]
    html = page([found], ["<what>"])
    assert "&lt;what&gt;" in html
    assert html.count("<svg") == 2


def test_the_simulated_load_begins_after_an_idle_look_back() -> None:
    load = plan(1_200, 40, out=100)  # 1 s each, 30 at once: asks for 3 replicas
    scaling = Scaling(
        max_replicas=20, target_ongoing_requests=10, upscale_delay_s=0, look_back_period_s=30
    )
    args = (load, load.sizes, load.out, MODEL, scaling, Platform(cold_start_s=1, node_s=0), 2.0)
    [(first, lead), *_] = simulations(*args)
    line = first.timeline
    rose = [at for at, target in zip(line.at, line.target, strict=True) if target > 1]
    assert lead == 40  # the look-back, and one report
    assert rose[0] > lead
    assert line.target[-1] >= 3


class Service:
    """Answers as the service does, after a time in the engine and one outside it."""

    def __init__(self, status: int = 200) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.status = status
        self.target = 1

    def summary(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        time.sleep(0.12)
        usage = {
            "input_tokens": len(body["text"].split()) + 1,
            "output_tokens": body["max_new_tokens"],
            "queue_ms": 0.0,
            "compute_ms": 100.0,
        }
        return {"summary": "…", "usage": usage}

    def details(self) -> dict[str, Any]:
        summarizer = {
            "target_num_replicas": self.target,
            "replicas": [{"state": "RUNNING"}, {"state": "STOPPING"}],
            "deployment_config": {
                "max_ongoing_requests": 1024,
                "autoscaling_config": {"max_replicas": 1, "look_back_period_s": 1.0},
            },
        }
        return {"applications": {"t5-serve": {"deployments": {"Summarizer": summarizer}}}}


@contextmanager
def served(service: Service) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200, service.details())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(service.status, service.summary(body))

        def _answer(self, status: int, told: dict[str, Any]) -> None:
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_port}"
        one.shutdown()


def verified(url: str, folder: Path, *args: str) -> tuple[int, str, str]:
    model = folder / "replica.yaml"
    model.write_text(json.dumps(MODEL.model_dump()))
    options = [
        *("verify", "--url", url, "--model", str(model), "--input-tokens", "30"),
        *("--output-tokens", "10", "--duration", "2", "--rate", "10", "--probes", "3"),
        *("--set", "max_replicas=1", "--set", "look_back_period_s=1", "--set"),
        *("push_interval_s=0.5", "--max-lag", "30", *args),
    ]
    result = CliRunner().invoke(command, options, standalone_mode=False)
    said = str(result.exception) if result.exception else ""
    return (result.return_value if result.exception is None else 2), result.stdout, said


LENIENT = ("--tolerance", "100", "--replica-tolerance", "100")


def test_the_command_sends_and_simulates_the_same_requests(tmp_path: Path) -> None:
    service, html = Service(), tmp_path / "verify.html"
    with served(service) as url:
        code, out, _ = verified(
            url, tmp_path, "--dashboard", url, "--json", "--html", str(html), *LENIENT
        )
    told = json.loads(out)
    assert code == 0
    # Three to warm up, three of the probe, then the load.
    assert told["live"]["requests"] == told["simulated"]["requests"] == len(service.bodies) - 6
    names = ("p50_error", "p95_error", "p99_error", "attainment_error", "seconds")
    assert all(isinstance(told[name], float) for name in names)
    assert told["name"] == "poisson"
    assert told["timeline_distance"] == 0
    assert set(told["timelines"]["live"]["running"]) == {1}
    for body in service.bodies:
        assert body["min_new_tokens"] == body["max_new_tokens"] == 10
        assert len(body["text"].split()) == 30
    assert len({body["text"] for body in service.bodies[6:]}) == len(service.bodies) - 6
    assert "simulated and live" in html.read_text(encoding="utf-8")


def test_out_of_tolerance_is_exit_status_1(tmp_path: Path) -> None:
    with served(Service()) as url:
        code, out, _ = verified(url, tmp_path, "--tolerance", "0.000001")
    assert code == 1
    assert "replicas of the live side were not seen" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "max_replicas=3", "--dashboard", "URL"],
         "max_replicas: the service has 1, to be simulated is 3"),
        (["--against-defaults"], "--against-defaults needs a service started here"),
        (["--rate", "0.0001"], "the load has no request"),
        (["--dashboard", "http://127.0.0.1:9"], "http://127.0.0.1:9/api/serve/applications/: "),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    with served(Service()) as url:
        code, _, said = verified(url, tmp_path, *(url if one == "URL" else one for one in args))
    assert code == 2
    assert message in said
    assert "\n" not in said


def test_a_service_that_fails_the_probe_is_told(tmp_path: Path) -> None:
    with served(Service(status=500)) as url:
        code, _, said = verified(url, tmp_path)
    assert code == 2
    assert "the probe failed: 500" in said


def test_a_load_that_was_not_sent_in_time_is_not_compared(tmp_path: Path) -> None:
    with served(Service()) as url:
        code, out, _ = verified(url, tmp_path, "--max-lag", "0.0000001")
    assert code == 1
    assert out == ""


def test_answers_without_usage_count_for_nothing() -> None:
    answers = Answers.of(1)
    for content in (b"", b"[]", b'{"usage": {"input_tokens": 3}}'):
        answers.add(0, content)
    assert np.isnan(answers.input_tokens).all()
    answers.add(0, json.dumps({"usage": {"input_tokens": 3, "output_tokens": 2, "queue_ms": 4,
                                         "compute_ms": 5}}).encode())  # fmt: skip
    assert (answers.input_tokens[0], answers.compute_s[0]) == (3, 0.005)
