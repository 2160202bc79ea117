"""What observing costs: the same real service with and without it, in turns, in one run.

    python -m bench.observability --rounds 40

Each variant is an application of its own on one Ray, so all of them are there all the time, and
only the one whose turn it is works. A round asks each variant the same texts, in an order that
changes from round to round; a variant's figure is the median over rounds of its ratio to the bare
one in the same round. On a shared machine wall time is noise of several percent; CPU time of the
replicas is less so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["RAY_AUTH_MODE"] = "disabled"  # it listens on loopback only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
os.environ["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] = "0"

import httpx
import psutil
import ray
from ray import serve

from serve_app.api.deployment import Api
from serve_app.app import build
from serve_app.config import ServiceSettings
from serve_app.metrics.exporter import Exporter
from serve_app.summarizer import Summarizer
from tests.texts import texts

BARE, AGAIN = "bare", "again"
WITHOUT_METRICS = (BARE, AGAIN)


class Collector(BaseHTTPRequestHandler):
    """Takes spans and forgets them."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@dataclass(frozen=True)
class Variant:
    """One application and the processes of its replicas."""

    name: str
    url: str
    processes: list[psutil.Process]

    def cpu_s(self) -> float:
        """CPU seconds of its replicas so far.

        By the processes' own clocks, in nanoseconds: psutil has the kernel's ticks, of which a
        round is only a few. The clock's number is made as clock_getcpuclockid(3) does.
        """
        clocks = [(~process.pid << 3) | 2 for process in self.processes]
        return sum(time.clock_gettime_ns(clock) for clock in clocks) / 1e9


def variants(collector: str) -> dict[str, dict[str, Any]]:
    """Settings by name; `bare` has none of it but the log, which a request does not reach.

    `again` is what the method finds where there is nothing to find.
    """
    off: dict[str, Any] = {"usage": {"enabled": False}, "log": {"level": "WARNING"}}
    traced = {"endpoint": collector}
    return {
        BARE: off,
        AGAIN: off,
        "metrics": off,
        "default": {},  # metrics and usage events
        "traces-0": {"tracing": {**traced, "sample_ratio": 0}},  # and these
        "traces-0.1": {"tracing": {**traced, "sample_ratio": 0.1}},
        "traces-1": {"tracing": {**traced, "sample_ratio": 1}},
    }


def _silence() -> None:
    """In this process the service's own series count nothing; Serve's go on."""
    for method in ("add", "inc_now", "set", "observe", "flush"):
        setattr(Exporter, method, lambda *_: None)


class _Api(Api):  # type: ignore[misc]
    async def __init__(self, *args: Any) -> None:
        _silence()
        await super().__init__(*args)


class _Summarizer(Summarizer):
    async def __init__(self, *args: Any) -> None:
        _silence()
        await super().__init__(*args)


@contextmanager
def _without_metrics() -> Iterator[None]:
    """Applications that are built in here have replicas whose own series count nothing."""
    with patch.multiple("serve_app.app", Api=_Api, Summarizer=_Summarizer):
        yield


def deploy(name: str, number: int, settings: dict[str, Any], folder: Path, url: str) -> Variant:
    """Start an application and find its replicas' processes."""
    usage = {"folder": str(folder / str(number)), **settings.get("usage", {})}
    arguments = {"auth": "off", **settings, "usage": usage}
    before = _replicas()
    serve.run(
        build(ServiceSettings.model_validate(arguments)),
        name=f"v{number}",
        route_prefix=f"/v{number}",
    )
    return Variant(name, f"{url}/v{number}/v1/summarize", [*(_replicas() - before)])


def _replicas() -> set[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return {process for process in found if "ServeReplica" in " ".join(process.cmdline())}


async def ask(variant: Variant, bodies: list[dict[str, Any]], clients: int) -> float:
    """Seconds for all of them, `clients` at a time."""
    waiting = iter(bodies)
    async with httpx.AsyncClient(timeout=120) as http:

        async def client() -> None:
            for body in waiting:
                answer = await http.post(variant.url, json=body)
                answer.raise_for_status()

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float]:
    """Median, and its 95% interval by resampling."""
    chance = random.Random(1)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(2_000))
    shown = {"median": statistics.median(values), "low": medians[50], "high": medians[-51]}
    return {name: round(value, 2) for name, value in shown.items()}


def run(
    names: list[str], bodies: list[dict[str, Any]], rounds: int, clients: int
) -> list[dict[str, Any]]:
    """A row for each variant."""
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    requests = len(bodies)
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        known = variants(f"http://127.0.0.1:{collector.server_port}")
        wanted = {name: known[name] for name in names}
        url = f"http://127.0.0.1:{port}"
        made = [
            deploy(name, number, settings, Path(folder), url)
            for number, (name, settings) in enumerate(wanted.items())
        ]
        for variant in made:
            asyncio.run(ask(variant, bodies, clients))  # warm up
        for number in range(rounds):
            order = random.Random(number).sample(made, len(made))
            for variant in order:
                before = variant.cpu_s()
                seconds = asyncio.run(ask(variant, bodies, clients))
                wall.setdefault(variant.name, []).append(seconds)
                cpu.setdefault(variant.name, []).append(variant.cpu_s() - before)
        serve.shutdown()
    ray.shutdown()
    collector.shutdown()
    return [row(name, requests, cpu, wall) for name in wanted]


def row(
    name: str, requests: int, cpu: dict[str, list[float]], wall: dict[str, list[float]]
) -> dict[str, Any]:
    """What a variant costs beside the bare one of the same round."""
    both = list(zip(cpu[name], cpu[BARE], strict=True))
    return {
        "variant": name,
        "cpu_ms_per_request": round(1e3 * statistics.median(cpu[name]) / requests, 3),
        "more_cpu_us_per_request": spread([1e6 * (a - b) / requests for a, b in both]),
        "more_cpu_percent": spread([100 * (a / b - 1) for a, b in both]),
        "more_wall_percent": spread(
            [100 * (a / b - 1) for a, b in zip(wall[name], wall[BARE], strict=True)]
        ),
    }


def main() -> None:
    """Print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description="What usage events, metrics and traces cost.")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(variants("")),
        choices=list(variants("")),
        help="with bare; each takes 0.6 GB",
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--requests", type=int, default=64, help="of a variant in a round")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument(
        "--max-new-tokens", type=int, help="1: cheap requests, for a finer figure in microseconds"
    )
    given = parser.parse_args()
    settings = {} if given.max_new_tokens is None else {"max_new_tokens": given.max_new_tokens}
    bodies = [{"text": text, **settings} for text in texts(given.requests)]
    columns = ["more_cpu_us_per_request", "more_cpu_percent", "more_wall_percent"]
    print("| | CPU ms per request | CPU, us more | CPU, % more | wall, % more |")
    print("|---|---|---|---|---|")
    for one in run(given.variants, bodies, given.rounds, given.clients):
        shown = [
            f"{one[kind]['median']:+.1f} ({one[kind]['low']:+.1f} to {one[kind]['high']:+.1f})"
            for kind in columns
        ]
        print(f"| {one['variant']} | {one['cpu_ms_per_request']:.2f} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
