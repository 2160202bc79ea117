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
# As `t5-serve run` and the chart have it.
os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
os.environ["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] = "0"

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
from tests.texts import texts

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

    def client(self, timeout: float = 300) -> httpx.Client:
        """An authorized HTTP client."""
        return httpx.Client(headers=self.headers, timeout=timeout, limits=httpx.Limits())

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST JSON with the service's token."""
        with self.client() as client:
            return client.post(self.url + path, json=body, **options)

    def stays(self, seconds: float, at_most: int, **options: Any) -> dict[str, Any]:
        """A request that the idle engine works on for about so many seconds, as it measures.

        A step takes ten times as long on one machine as on another. `at_most` are tokens.
        """

        def body(tokens: int) -> dict[str, Any]:
            size = {"min_new_tokens": tokens, "max_new_tokens": tokens}
            return {"text": texts(1)[0], "timeout_s": 300, **size, **options}

        tokens = 64
        while True:
            began = time.monotonic()
            assert self.post("/v1/summarize", body(tokens)).status_code == 200
            step_s = (time.monotonic() - began) / tokens
            # A short one is mostly the way to the engine and back.
            if tokens * step_s > 0.5 or tokens * 4 > at_most:
                return body(max(1, min(at_most, int(seconds / step_s))))
            tokens *= 4

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


class Deployer:
    """Deploys applications with the given settings, each under a path of its own."""

    def __init__(self, cluster: Cluster, folders: pytest.TempPathFactory) -> None:
        self._cluster = cluster
        self._folders = folders
        self._names: list[str] = []

    def __call__(self, name: str, prefix: str, **settings: Any) -> Service:
        tokens_file = self._folders.mktemp(name) / "tokens.json"
        _, token = create(tokens_file, "tester", None)
        settings.setdefault("auth", {"tokens_file": str(tokens_file)})
        settings.setdefault("usage", {"folder": str(tokens_file.with_name("usage"))})
        arguments = ServiceSettings.model_validate(settings)
        self._names.append(name)
        serve.run(build(arguments), name=name, route_prefix=prefix)
        url = self._cluster.url + prefix.rstrip("/")
        return Service(name, url, token, tokens_file, self._cluster)

    def close(self) -> None:
        """Delete them: the next ones need memory and processors, too."""
        for name in self._names:
            serve.delete(name)


Deploy = Callable[..., Service]


@pytest.fixture(scope="module")
def deploy(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deploy]:
    """See `Deployer`. What a module has deployed ends with it."""
    deployer = Deployer(cluster, tmp_path_factory)
    yield deployer
    deployer.close()


@pytest.fixture(scope="session")
def service(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """The service as `make run` starts it: demo model, token auth, one replica, at `/`."""
    return Deployer(cluster, tmp_path_factory)("main", "/")
