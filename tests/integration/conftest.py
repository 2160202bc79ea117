"""A real Ray Serve for the integration tests: one cluster, applications on demand."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # the cluster listens on loopback only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"  # as `t5-serve run` and the chart have it

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.app import build
from serve_app.calls import Probe
from serve_app.config import ServiceSettings
from serve_app.tokens import create

HOST = "127.0.0.1"


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], what: str, timeout_s: float = 90) -> Any:
    """Wait for something that must come; the bound only ends a broken test."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"never happened: {what}")


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster with Serve's proxy."""

    url: str
    metrics_url: str

    def series(self, name: str, **labels: str) -> float:
        """Sum of a Prometheus series over all replicas, 0 where it does not exist yet."""
        text = httpx.get(self.metrics_url, timeout=30).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@dataclass(frozen=True)
class Service:
    """One running application. `url` has no trailing slash."""

    name: str
    url: str
    token: str
    tokens_file: Path
    cluster: Cluster

    @property
    def headers(self) -> dict[str, str]:
        """Headers of an authorized request."""
        return {"Authorization": f"Bearer {self.token}"}

    def client(self, timeout: float = 120) -> httpx.Client:
        """An authorized HTTP client."""
        return httpx.Client(headers=self.headers, timeout=timeout, limits=httpx.Limits())

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST JSON with the service's token."""
        with self.client() as client:
            return client.post(self.url + path, json=body, **options)

    def probe(self) -> Probe:
        """Load figures of one replica's engine."""
        handle: DeploymentHandle[Any] = serve.get_deployment_handle("Summarizer", self.name)
        return handle.probe.remote(1e9).result()

    def idle(self) -> None:
        """Wait until the engine has nothing to do."""

        def is_idle() -> bool:
            load = self.probe().load
            return load.running_requests == 0 and load.waiting_requests == 0

        until(is_idle, "the engine is idle")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    metrics_port, port = free_port(), free_port()
    ray.init(
        num_cpus=16,  # logical: several applications share this machine
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=metrics_port,
        _system_config={"metrics_report_interval_ms": 500},
    )
    serve.start(http_options={"host": HOST, "port": port})
    yield Cluster(f"http://{HOST}:{port}", f"http://{HOST}:{metrics_port}/metrics")
    serve.shutdown()
    ray.shutdown()


Deploy = Callable[..., Service]


@pytest.fixture(scope="session")
def deploy(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Deploy:
    """Deploys an application with the given settings under a path of its own."""

    def run(name: str, prefix: str, **settings: Any) -> Service:
        tokens_file = tmp_path_factory.mktemp(name) / "tokens.json"
        _, token = create(tokens_file, "tester", None)
        settings.setdefault("auth", {"tokens_file": str(tokens_file)})
        settings.setdefault("usage", {"folder": str(tokens_file.with_name("usage"))})
        # Replicas share two cores with the tests: a stall is minutes here, not seconds.
        arguments = ServiceSettings.model_validate(settings)
        serve.run(build(arguments), name=name, route_prefix=prefix)
        url = cluster.url + prefix.rstrip("/")
        return Service(name, url, token, tokens_file, cluster)

    return run


@pytest.fixture(scope="session")
def service(deploy: Deploy) -> Service:
    """The service as `make run` starts it: demo model, token auth, one replica, at `/`."""
    return deploy("main", "/")
