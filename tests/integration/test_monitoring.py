"""A real Prometheus scrapes a real service: every query of every dashboard, every rule, alerts."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from monitoring.boards import BOARDS
from monitoring.prometheus import Prometheus
from tests.chart.conftest import CHART, tool
from tests.integration.conftest import Cluster, Deploy, Service, free_port, until
from tests.texts import long_text, texts

# Of a GPU, and there is none: tests/chart/test_dashboards.py sees that Ray still has the name.
NEED_A_GPU = "ray_node_gpus_utilization"
# Fire within the test: their condition is made to happen. The others, and the times that all of
# them take, are promtool's: tests/chart/test_rules.py.
FIRE = {
    "T5ErrorBudgetBurnsFast",
    "T5ErrorBudgetBurns",
    "T5ErrorBudgetBurnsSlowly",
    "T5RequestsShed",
    "T5ReplicasAtMax",
    "T5ReplicasUnhealthy",
    "T5UsageEventsDropped",
}


def rendered_rules() -> dict[str, Any]:
    """The chart's rules for one replica at most. Alerts wait a second, not minutes."""
    values = {
        "metrics": {"rules": {"enabled": True, "healthFailures": 1}},
        "summarizer": {"autoscaling_config": {"max_replicas": 1}},
    }
    done = subprocess.run(
        [tool("helm"), "template", "t5", CHART, "--namespace", "prod", "--values", "-",
         "--show-only", "templates/prometheusrule.yaml"],
        input=yaml.safe_dump(values), capture_output=True, text=True, check=True,
    )  # fmt: skip
    spec = yaml.safe_load(done.stdout)["spec"]
    for group in spec["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["for"] = "1s"
    return spec


class Load:
    """Clients that send what the dashboards show, again and again, until told to stop."""

    def __init__(self, service: Service) -> None:
        self._url = service.url
        self._stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(12) as pool:
            working = [pool.submit(self._summaries, at) for at in range(8)]
            working += [pool.submit(self._others), pool.submit(self._impatient)]
            working.append(pool.submit(self._greedy))
            try:
                yield
            finally:
                self._stop.set()
        for one in working:
            one.result()

    def _client(self, name: str) -> httpx.Client:
        headers = {"X-Api-Client": name}
        return httpx.Client(base_url=self._url, headers=headers, timeout=120, trust_env=False)

    def _summaries(self, at: int) -> None:
        with self._client(f"client-{at % 3}") as client:
            while not self._stop.is_set():
                for text in texts(4):
                    client.post("/v1/summarize", json={"text": text, "max_new_tokens": 48})

    def _others(self) -> None:
        """What is wrong, cut, and split."""
        with self._client("others") as client:
            while not self._stop.is_set():
                client.post("/v1/summarize", json={"text": ""})
                text = long_text(1_500)
                for overflow in ("truncate", "map_reduce"):
                    body = {"text": text, "on_overflow": overflow, "max_new_tokens": 16}
                    client.post("/v1/summarize", json=body)
                client.get("/readyz")

    def _impatient(self) -> None:
        """Who goes away before there is an answer, and who has no time."""
        with self._client("impatient") as client:
            body = {"text": texts(1)[0], "min_new_tokens": 400, "max_new_tokens": 400}
            while not self._stop.is_set():
                with client.stream("POST", "/v1/summarize", json={**body, "stream": True}) as one:
                    next(one.iter_bytes(), None)
                client.post("/v1/summarize", json={**body, "timeout_s": 0.2})

    def _greedy(self) -> None:
        """Who has had all tokens that are its own."""
        with self._client("greedy") as client:
            while not self._stop.wait(0.5):
                client.post("/v1/summarize", json={"text": texts(1)[0], "max_new_tokens": 8})


@pytest.fixture
def loaded(deploy: Deploy) -> Service:
    """The application as the chart names it, with queues so short that they run over."""
    return deploy(
        "t5-serve",
        "/monitored",
        auth="trusted-header",
        engine={"max_waiting_requests": 3, "max_batch_size": 3},
        replicas={"min": 0, "max": 1, "target_ongoing_requests": 1, "health_check_period_s": 1},
        usage={"queue_size": 1},
        rate_limits={
            "enabled": True,
            "tokens_per_minute": 0,
            "tiers": [
                {"name": "few", "match": "greedy", "tokens_per_minute": 1, "burst_tokens": 1}
            ],
        },
    )


@pytest.mark.timeout(600)
def test_every_query_has_data_and_alerts_fire(
    cluster: Cluster, loaded: Service, tmp_path: Path
) -> None:
    program = tool("prometheus")
    target = cluster.metrics_url.removeprefix("http://").removesuffix("/metrics")
    panels = [(board, panel) for board in BOARDS for panel in board.panels]
    queries = {
        f"{board.name}: {panel.title}: {query.legend}": query.expr
        for board, panel in panels
        for query in panel.queries
        if NEED_A_GPU not in query.expr
    }
    with Prometheus(program, tmp_path, target, free_port(), rules=rendered_rules()) as prometheus:
        with Load(loaded).running():

            def missing() -> list[str]:
                return [name for name, expr in queries.items() if not _numbers(prometheus, expr)]

            _wait(lambda: not missing(), missing)
            records = {rule["name"] for rule in prometheus.rules() if rule["type"] == "recording"}
            _wait(
                lambda: all(_numbers(prometheus, name) for name in records),
                lambda: [name for name in records if not _numbers(prometheus, name)],
            )
            os.kill(loaded.probe().pid, signal.SIGKILL)
            _wait(lambda: prometheus.firing() >= FIRE, lambda: sorted(FIRE - prometheus.firing()))
        assert [rule for rule in prometheus.rules() if rule["health"] != "ok"] == []
        # Nothing is stuck, and the replicas are seen.
        assert not {"T5NoProgress", "T5Down"} & prometheus.firing()
        # When the load has gone, so have who was in flight.
        until(
            lambda: _numbers(prometheus, "sum(ray_t5_client_requests_in_flight)") == [0],
            "no client has a request in flight",
        )
        # Labels are the PodMonitors', not what Ray makes of itself.
        [series] = prometheus.query(
            'max by (namespace, job, ray_io_cluster) (ray_t5_slots{job="t5"})'
        )
        assert series.labels == {"namespace": "prod", "job": "t5", "ray_io_cluster": "t5-local"}


def _numbers(prometheus: Prometheus, expr: str) -> list[float]:
    return [one.value for one in prometheus.query(expr) if not math.isnan(one.value)]


def _wait(condition: Any, still: Any) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, f"no data, or not firing: {still()}"
        time.sleep(1)
