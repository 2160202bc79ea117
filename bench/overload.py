"""Too much load, and a client that asks for much: `python -m bench.overload [--quick]`.

The real service on this machine, one engine on the demo model. Four loads one after the other:

- peak: an open loop whose rate rises until goodput (answers within their deadline) grows no more;
- overload: three times that rate, for five minutes; then how soon latency is as before;
- storm: 150 clients that begin at once, and come back when `Retry-After` says so;
- fair share: short texts of one client, alone and beside another one's documents of 300 chunks.

Answers are long, so that the engine and not HTTP is what there is too little of. Prints the table
of docs/reliability.md. The generator takes processors, too: each load tells how much.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # it listens on loopback only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
os.environ["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] = "0"

import httpx
import numpy as np
import psutil
import ray
from ray import serve

from serve_app.app import build
from serve_app.config import ServiceSettings
from serve_app.tuning.measured import Measured, Spread, measure
from serve_app.tuning.send import Run, Target, send
from serve_app.tuning.texts import made_up
from serve_app.usage.folder import segments
from tests.integration.conftest import free_port
from tests.texts import texts

RESULTS = Path(__file__).parent / "results" / "overload.json"
_CLIENT = "X-Api-Client"
_GROWS = 1.05  # goodput that a higher rate must bring, or the peak was before
_RISE = 1.4  # of the rate, from one step to the next
_REFUSED = (429, 503)
_STORM_S, _SHORTS_S = 120, 120  # after which a load is given up
_DOCUMENT_WORDS = 152_000  # about a token each, which makes 300 parts


@dataclass(frozen=True)
class Sizes:
    """What is asked for, and how long."""

    output_tokens: int
    deadline_s: float
    step_s: float
    overload_s: float
    storm: int
    shorts: int
    documents: int


@dataclass(frozen=True)
class Live:
    """The running service: its address, its usage events and its processes."""

    url: str
    usage: Path
    processes: dict[str, list[psutil.Process]]

    def cpu_s(self) -> dict[str, float]:
        """Seconds of processors so far, by what the processes are."""
        return {
            name: sum(sum(one.cpu_times()[:2]) for one in processes)
            for name, processes in self.processes.items()
        }

    def resident_mb(self) -> float:
        """Of all replicas."""
        replicas = (*self.processes["api"], *self.processes["engine"])
        return sum(one.memory_info().rss for one in replicas) / 2**20

    def refusals_ms(self, since: float, until: float) -> list[float]:
        """How long refusals took that were sent within a time, by the service's own events."""
        found = []
        for path in segments(self.usage):
            for line in path.read_text(encoding="utf-8").splitlines():
                event = json.loads(line)
                at = datetime.fromisoformat(event["time"]).timestamp()
                if event["status"] in _REFUSED and since <= at <= until:
                    found.append(event["total_ms"])
        return found


@contextmanager
def running(folder: Path) -> Iterator[Live]:
    """The service as it is by default, on a Ray of its own; clients name themselves."""
    port = free_port()
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = {"auth": {"mode": "trusted-header"}, "usage": {"folder": str(folder)}}
    serve.run(build(ServiceSettings.model_validate(settings)))
    names = {"proxy": "ProxyActor", "api": ":Api", "engine": ":Summarizer"}
    children = [(" ".join(one.cmdline()), one) for one in psutil.Process().children(recursive=True)]
    processes = {
        name: [one for line, one in children if line.startswith("ray::") and part in line]
        for name, part in names.items()
    }
    try:
        yield Live(f"http://127.0.0.1:{port}/v1/summarize", folder, processes)
    finally:
        serve.shutdown()
        ray.shutdown()


@cache
def single_parts() -> list[str]:
    """Texts of one part: a longer one can be refused after its first pass, so not at once."""
    return [text for text in texts(200) if text.isascii() and len(text) < 600]


def body(number: int, sizes: Sizes) -> bytes:
    """A short text with a long answer."""
    pool = single_parts()
    tokens = sizes.output_tokens
    asked = {
        "text": pool[number % len(pool)], "min_new_tokens": tokens, "max_new_tokens": tokens,
        "timeout_s": sizes.deadline_s,
    }  # fmt: skip
    return json.dumps(asked).encode()


def load(live: Live, rate: float, seconds: float, sizes: Sizes) -> tuple[Run, Measured]:
    """Send at a rate, by Poisson, for so long, as one client."""
    gaps = np.random.default_rng(round(rate * 1e3)).exponential(1 / rate, int(rate * seconds * 2))
    due = [float(one) for one in np.cumsum(gaps) if one < seconds]
    headers = {_CLIENT: "crowd", "Content-Type": "application/json"}
    target = Target(live.url, headers, timeout_s=60, most_in_flight=20_000, trust_env=False)
    run = Run()
    asyncio.run(send(due, lambda at: body(at, sizes), target, run, asyncio.Event()))
    return run, measure(run, seconds, sizes.deadline_s, max_lag_s=0.1)


def peak(live: Live, sizes: Sizes) -> tuple[float, float]:
    """The rate at which goodput was highest, and that goodput."""
    rate, best = 4.0, (0.0, 0.0)
    while True:
        _, measured = load(live, rate, sizes.step_s, sizes)
        print(f"  at {rate:.0f}/s: {measured.goodput:.1f}/s within the deadline", flush=True)
        if measured.goodput < best[1] * _GROWS and rate > 1.3 * best[1]:
            return max(best, (rate, measured.goodput), key=lambda one: one[1])
        best = max(best, (rate, measured.goodput), key=lambda one: one[1])
        rate *= _RISE


def overload(live: Live, sizes: Sizes) -> dict[str, Any]:
    """Three times the peak, and what comes after."""
    settle(live, sizes)
    normal = settle(live, sizes)
    _, best = peak(live, sizes)
    settle(live, sizes)
    before, cpu, began = live.resident_mb(), live.cpu_s(), time.time()
    run, measured = load(live, 3 * best, sizes.overload_s, sizes)
    ended, spent = time.time(), live.cpu_s()
    recovered = recovery(live, sizes, normal)
    refused = Spread.of(np.array(live.refusals_ms(began, ended)))
    # Goodput of the time in which it was overloaded: of requests that were due in it.
    good = sum(one.kind == "" and one.latency_s <= sizes.deadline_s for one in run.sent)
    return {
        "peak_goodput": best,
        "rate": 3 * best,
        "goodput": good / sizes.overload_s,
        "kept": good / sizes.overload_s / best,
        "outcomes": {"200": measured.succeeded, **measured.errors},
        "refusal_ms": {name: refused.quantiles[name] for name in ("p50", "p99")},
        "refusal_seen_ms": {
            name: (measured.failed_latency.quantiles[name] or 0) * 1e3 for name in ("p50", "p99")
        },
        "resident_mb": [before, live.resident_mb()],
        "recovery_s": recovered,
        "cpu": {name: (spent[name] - cpu[name]) / (ended - began) for name in cpu}
        | {"generator": measured.cpu},
    }


def settle(live: Live, sizes: Sizes) -> float:
    """Median seconds of an answer when there is nothing else to do."""
    with httpx.Client(headers={_CLIENT: "crowd"}, trust_env=False, timeout=60) as http:
        times = []
        for number in range(8):
            began = time.perf_counter()
            asked = {**json.loads(body(number, sizes)), "timeout_s": 60}
            http.post(live.url, json=asked).raise_for_status()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def recovery(live: Live, sizes: Sizes, normal_s: float) -> float:
    """Seconds until three answers in a row take no more than twice what they took before."""
    began, row = time.perf_counter(), 0
    first = 0.0
    with httpx.Client(headers={_CLIENT: "crowd"}, trust_env=False, timeout=60) as http:
        for number in range(1_000):
            sent = time.perf_counter()
            answer = http.post(live.url, content=body(number, sizes), headers=_JSON)
            fast = answer.status_code == 200 and time.perf_counter() - sent <= 2 * normal_s
            first = sent if fast and not row else first
            row = row + 1 if fast else 0
            if row == 3:
                return first - began
    return float("inf")


_JSON = {"Content-Type": "application/json"}


def storm(live: Live, sizes: Sizes) -> dict[str, Any]:
    """Well-behaved clients that begin at once: who is refused waits as told, and asks again."""
    attempts: list[int] = []
    tried = 0

    async def client(http: httpx.AsyncClient, number: int) -> None:
        nonlocal tried
        for attempt in range(1, 1_000):
            tried += 1
            answer = await http.post(live.url, content=body(number, sizes), headers=_JSON)
            if answer.status_code == 200:
                attempts.append(attempt)
                return
            # 408: accepted, and late all the same.
            await asyncio.sleep(float(answer.headers.get("retry-after", 1)))

    async def all_of_them() -> float:
        limits = httpx.Limits(max_connections=None)
        headers = {_CLIENT: "crowd"}
        async with httpx.AsyncClient(
            timeout=120, limits=limits, headers=headers, trust_env=False
        ) as http:
            began = time.perf_counter()
            with suppress(TimeoutError):
                async with asyncio.timeout(_STORM_S):
                    await asyncio.gather(*(client(http, number) for number in range(sizes.storm)))
            return time.perf_counter() - began

    seconds = asyncio.run(all_of_them())
    return {
        "clients": sizes.storm,
        "served": len(attempts),
        "seconds": seconds,
        "attempts_mean": tried / sizes.storm,
    }


def fair_share(live: Live, sizes: Sizes) -> dict[str, Any]:
    """A light client's short texts alone, and beside documents without pause."""
    rng = np.random.default_rng(1)
    documents: list[int] = []

    async def heavy(http: httpx.AsyncClient, stop: asyncio.Event) -> None:
        while not stop.is_set():
            asked = {"text": made_up(_DOCUMENT_WORDS, rng), "timeout_s": 300}
            answer = await http.post(live.url, json=asked, headers={_CLIENT: "heavy"})
            documents.append(answer.status_code)
            await asyncio.sleep(float(answer.headers.get("retry-after", 0)))

    async def light(http: httpx.AsyncClient) -> tuple[list[float], list[int]]:
        times, refused = [], []
        first = time.perf_counter()
        for text in texts(sizes.shorts):
            began = time.perf_counter()
            if began - first > _SHORTS_S:
                break
            answer = await http.post(
                live.url, json={"text": text, "timeout_s": 60}, headers={_CLIENT: "light"}
            )
            if answer.status_code == 200:
                times.append(time.perf_counter() - began)
            else:
                refused.append(answer.status_code)
        return times, refused

    async def both() -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=400, trust_env=False, limits=httpx.Limits()) as http:
            await light(http)  # warm up
            alone, _ = await light(http)
            stop = asyncio.Event()
            beside = [asyncio.create_task(heavy(http, stop)) for _ in range(sizes.documents)]
            await asyncio.sleep(5)  # until they fill the engine
            cpu, began = live.cpu_s(), time.perf_counter()
            times, refused = await light(http)
            seconds, spent = time.perf_counter() - began, live.cpu_s()
            stop.set()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        p95 = [Spread.of(np.array(one)).quantiles["p95"] or float("inf") for one in (alone, times)]
        return {
            "alone_p95_s": p95[0],
            "beside_p95_s": p95[1],
            "ratio": p95[1] / p95[0],
            "answered": len(times),
            "refused": refused,
            "seconds": seconds,
            "documents": documents,
            "cpu": {name: (spent[name] - cpu[name]) / seconds for name in cpu},
        }

    return asyncio.run(both())


def table(told: dict[str, Any]) -> str:
    """Goals and figures as Markdown."""
    lines = ["| goal | figure |", "|---|---|"]
    if one := told.get("overload"):
        lines += [
            f"| goodput at 3x, of its peak: 90% | {one['kept']:.0%} of "
            f"{one['peak_goodput']:.1f}/s |",
            f"| refusal at the service, p99: 50 ms | {one['refusal_ms']['p99'] or 0:.0f} ms "
            f"(median {one['refusal_ms']['p50'] or 0:.0f}) |",
            f"| memory of replicas: flat | {one['resident_mb'][0]:.0f} to "
            f"{one['resident_mb'][1]:.0f} MB |",
            f"| latency normal again: 10 s | {one['recovery_s']:.1f} s |",
        ]
    if one := told.get("storm"):
        lines.append(
            f"| {one['clients']} clients at once: all served | {one['served']} in "
            f"{one['seconds']:.0f} s, {one['attempts_mean']:.1f} attempts each |"
        )
    if one := told.get("fair_share"):
        lines.append(
            f"| short texts beside documents, p95: below x2 | x{one['ratio']:.1f} "
            f"({one['alone_p95_s']:.2f} to {one['beside_p95_s']:.2f} s) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="40 s of overload, shorter steps")
    parser.add_argument(
        "--only", nargs="+", choices=["overload", "storm", "fair_share"], help="these loads"
    )
    parser.add_argument("--output-tokens", type=int, default=200)
    parser.add_argument("--deadline", type=float, default=4.0, help="of each request, seconds")
    parser.add_argument("--documents", type=int, default=8, help="at once, of the heavy client")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    quick = given.quick
    sizes = Sizes(
        given.output_tokens, given.deadline, 8 if quick else 20, 40 if quick else 300,
        150, 40 if quick else 120, given.documents,
    )  # fmt: skip
    phases = {"overload": overload, "storm": storm, "fair_share": fair_share}
    told: dict[str, Any] = {"arguments": {"quick": quick, "output_tokens": given.output_tokens,
                                          "deadline_s": given.deadline,
                                          "documents": given.documents}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as live:
        for name in given.only or phases:
            told[name] = phases[name](live, sizes)
            print(json.dumps({name: told[name]}), flush=True)
    print(table(told))
    given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
