"""`t5-serve tune explain` on a real service, by a real Prometheus and by Ray's own metrics page."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from monitoring.prometheus import Prometheus
from serve_app.cli.explain import command
from tests.chart.conftest import tool
from tests.integration.conftest import Cluster, Deploy, Service, free_port, until
from tests.texts import texts


def explained(*source: str) -> dict[str, Any]:
    result = CliRunner().invoke(command, [*source, "--json"], standalone_mode=False)
    assert result.exception is None, result.exception
    told: dict[str, Any] = json.loads(result.output)
    return told


def binding(*source: str) -> str | None:
    found = explained(*source)["binding"]
    return None if found is None else found["constraint"]


@contextmanager
def sending(service: Service, client: str, clients: int) -> Iterator[None]:
    """So many requests at once, for as long as it lasts."""
    stop = threading.Event()

    def send() -> None:
        headers = {"X-Api-Client": client}
        body = {"text": texts(1)[0], "min_new_tokens": 60, "max_new_tokens": 60}
        with httpx.Client(headers=headers, timeout=120, trust_env=False) as http:
            while not stop.wait(0.1):
                http.post(f"{service.url}/v1/summarize", json=body)

    with ThreadPoolExecutor(clients) as pool:
        working = [pool.submit(send) for _ in range(clients)]
        try:
            yield
        finally:
            stop.set()
    for one in working:
        one.result()


@pytest.fixture
def small(deploy: Deploy) -> Service:
    """One replica at most, which is meant to have one request, and a client with a small bucket."""
    return deploy(
        "explained",
        "/explained",
        auth="trusted-header",
        replicas={
            "min": 1,
            "max": 1,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 0,
            "look_back_period_s": 11,
        },
        rate_limits={
            "enabled": True,
            "tokens_per_minute": 0,
            "tiers": [
                {"name": "few", "match": "greedy", "tokens_per_minute": 1, "burst_tokens": 1}
            ],
        },
    )


@pytest.mark.timeout(600)
def test_what_was_made_to_bind_is_named(cluster: Cluster, small: Service, tmp_path: Path) -> None:
    target = cluster.metrics_url.removeprefix("http://").removesuffix("/metrics")
    port = free_port()
    with Prometheus(tool("prometheus"), tmp_path, target, port):
        source = ("--prometheus", f"http://127.0.0.1:{port}", "--window", "25", "--label",
                  "application=explained")  # fmt: skip
        page = ("--metrics", cluster.metrics_url, "--window", "2")
        with sending(small, "shop", 6):
            until(lambda: binding(*source) == "max_replicas", "at its most replicas", 180)
            told = explained(*source)
            assert told["binding"]["knob"] == "summarizer.autoscaling_config.max_replicas"
            assert told["missing"] == []
            # Other tests' applications are on that page, too.
            told = explained(*page)
            held = [told["binding"], *told["others"]]
            assert "max_replicas" in [one["constraint"] for one in held]
        with sending(small, "greedy", 2):
            until(lambda: binding(*source) == "rate_limit_tokens", "a client is refused", 180)
            assert explained(*source)["binding"]["knob"] == "rate_limits.tokens_per_minute"
