"""Measure: `python -m bench.engine --help`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.engine import models, report
from bench.engine.figures import Throughput, percentile
from bench.engine.floor import Floor
from bench.engine.ours import Ours
from bench.engine.peers import CTranslate, HuggingFace, best_types
from bench.engine.progress import say
from bench.engine.worker import RefusedError, Worker
from bench.engine.workloads import (
    Decoding,
    Work,
    arrivals,
    depth_seen,
    distinct,
    documents,
    mixed,
    single,
    source_seen,
)

GREEDY, BEAMS = Decoding(1, 0), Decoding(4, 3)
_SINGLE = "one request, 256 → 64 tokens, {}"
_MOST = 64  # output tokens of copied texts
_LOADS = (50, 80)  # percent of the best peer's throughput


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--model", choices=models.NAMES, default="small")
    parser.add_argument("--dtypes", nargs="+", help="of ours; bfloat16 on a GPU, else all three")
    parser.add_argument("--requests", type=int, default=512, help="offline, greedy")
    parser.add_argument("--beam-requests", type=int, default=128)
    parser.add_argument("--poisson-requests", type=int, default=120)
    parser.add_argument(
        "--tune-seconds", type=float, default=15, help="for each of a peer's batch sizes"
    )
    parser.add_argument("--peers", default="", help="only those whose name contains this")
    parser.add_argument("--batches", type=int, nargs="+", help="of peers; more on a GPU")
    parser.add_argument("--rows", type=int, help="of our running batch; 64, and what fits on a GPU")
    parser.add_argument("--repeats", type=int, default=7, help="of single requests")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--compiled", action="store_true", help="single requests also to a compiled generate()"
    )
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the JSON")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="few requests: does it run?")
    found = parser.parse_args()
    if found.quick:
        found.requests, found.beam_requests, found.poisson_requests = 24, 8, 12
        found.tune_seconds, found.repeats, found.batches = 1, 2, [8]
    gpu = found.device != "cpu"
    found.dtypes = found.dtypes or (["bfloat16"] if gpu else ["int8", "bfloat16", "float32"])
    found.batches = found.batches or ([128, 256] if gpu else [8, 16, 32, 64])
    if found.rows is None:
        found.rows = 0 if gpu else 64
    return found


class Bench:
    """One model's run."""

    def __init__(self, options: argparse.Namespace, path: Path, converted: Path | None) -> None:
        self.options, self.path = options, path
        self.gpu = options.device != "cpu"
        self.name = f"gpu-{options.model}" if self.gpu else options.model
        self.failed: list[str] = []
        self.result: dict[str, Any] = {
            "model": options.model,
            "machine": report.machine(options.threads, gpu=self.gpu),
            # Not where results go: a path of the machine.
            "arguments": {k: str(v) for k, v in vars(options).items() if k != "results"},
            "throughput": {}, "latency": {}, "poisson": {}, "counts": {},
            "floor": [], "memory": [], "ratios": [],
        }  # fmt: skip
        self.ours: dict[str, Worker] = {}
        self.peers: dict[str, Worker] = {}
        self.best: dict[str, tuple[str, int, float]] = {}  # by search: peer, batch, requests/s
        for dtype in ["bfloat16"] if self.gpu else ["float32", "bfloat16"]:
            make = (HuggingFace, str(path), dtype, options.device, options.threads)
            self._open(self.peers, f"transformers {dtype}", *make)
        for kind in best_types() if converted else []:
            make = (CTranslate, str(converted), kind, options.threads)
            self._open(self.peers, f"CTranslate2 {kind}", *make)

    def _open(self, to: dict[str, Worker], name: str, *make: Any) -> None:
        if to is self.peers and self.options.peers not in name:
            return
        try:
            to[name] = Worker(*make)
        except RefusedError as error:
            say(f"{name}: left out: {error}")

    def open_ours(self, rows: int, *, speculation: bool = False) -> None:
        """Our engine in all precisions; random weights repeat themselves, which lookup would
        profit from as no real text lets it, so speculation is off but for real text."""
        for worker in self.ours.values():
            worker.close()
        self.ours = {}
        for dtype in self.options.dtypes:
            make = (str(self.path), dtype, self.options.device, self.options.threads, rows)
            self._open(self.ours, f"t5-serve {dtype}", Ours, *make, speculation)

    def part(self, measure: Callable[..., None], *arguments: Any) -> None:
        """Measure one thing and save it; where that fails, say so and go on."""
        began = time.perf_counter()
        name = " ".join(
            [measure.__name__, *(a.label for a in arguments if isinstance(a, Decoding))]
        )
        try:
            measure(*arguments)
        except Exception:
            traceback.print_exc()
            self.failed.append(name)
        report.save(self.name, self.result, self.options.results)
        say(f"-- {name}: {time.perf_counter() - began:.1f} s")

    def close(self) -> None:
        """End all engines."""
        for worker in (*self.ours.values(), *self.peers.values()):
            worker.close()

    def single(self) -> None:
        """256 tokens in, 64 out, alone; engines take turns."""
        work = single(self.options.seed)
        for decoding in (GREEDY, BEAMS):
            times: dict[str, list[float]] = {name: [] for name in (*self.ours, *self.peers)}
            for turn in range(self.options.repeats + 1):
                for name, worker in (*self.ours.items(), *self.peers.items()):
                    seconds = worker.call("alone", work, decoding)
                    if turn:
                        times[name].append(seconds)
            rows = [
                {"engine": n, "ours": n in self.ours, "median": median(t), "best": min(t)}
                for n, t in times.items()
            ]
            self.result["latency"][_SINGLE.format(decoding.label)] = rows
            say(", ".join(f"{row['engine']} {row['median']:.3f} s" for row in rows))
            if decoding is GREEDY:
                self._ratio("single", "single request, greedy", rows, "median")

    def compiled(self) -> None:
        """The single request, greedy, with `generate()` compiled: a minute before its first."""
        device, threads = self.options.device, self.options.threads
        worker = Worker(HuggingFace, str(self.path), "bfloat16", device, threads, True)
        work = single(self.options.seed)
        times = [worker.call("alone", work, GREEDY) for _ in range(self.options.repeats + 2)]
        worker.close()
        say(f"compiled: {', '.join(f'{seconds:.3f}' for seconds in times)} s")
        name = "transformers compiled, bfloat16"
        row = {"engine": name, "ours": False, "median": median(times[2:]), "best": min(times[2:])}
        rows = self.result["latency"][_SINGLE.format(GREEDY.label)]
        rows.append(row)
        self.result["ratios"] = [one for one in self.result["ratios"] if one[0] != "single"]
        self._ratio("single", "single request, greedy", rows, "median")

    def offline(self, decoding: Decoding, count: int) -> None:
        """All requests at once."""
        works = mixed(count, self.options.seed)
        tokens = sum(work.tokens for work in works)
        rows: list[dict[str, Any]] = []
        for name, worker in self.ours.items():
            if self.gpu:  # which captures graphs when it first needs them
                worker.call("offline", works, decoding)
            seconds = worker.call("offline", works, decoding)
            rows.append(_speed(name, True, worker.call("rows"), tokens, seconds))
            if not self.gpu:
                self._floor(name, worker, works, decoding)
        tuned = {n: self._tune(n, worker, works, decoding) for n, worker in self.peers.items()}
        fastest = max((rate.tokens_per_s for rate, _, _ in tuned.values()), default=0.0)
        best: tuple[str, int, float] | None = None
        for name, (rate, batch, order) in tuned.items():
            # Those that may be the best do all of the load; of the others the sample will do.
            if rate.tokens_per_s > fastest / 1.5:
                rate = self.peers[name].call("offline", works, decoding, batch, order, math.inf)
            rows.append(_speed(name, False, batch, rate.tokens, rate.seconds))
            if best is None or rate.requests_per_s > best[2]:
                best = name, batch, rate.requests_per_s
        self.result["counts"][decoding.label] = f"{count} requests, {tokens} tokens"
        self.result["throughput"][decoding.label] = rows
        if best is None:
            return
        self.best[decoding.label] = best
        peer = max(row["tokens_per_s"] for row in rows if not row["ours"])
        key = "offline greedy" if decoding is GREEDY else "offline beams"
        for row in rows:
            if row["ours"]:
                label = f"offline, {decoding.label}, {row['engine']}"
                self.result["ratios"].append((key, label, row["tokens_per_s"] / peer))

    def _tune(
        self, name: str, worker: Worker, works: list[Work], decoding: Decoding
    ) -> tuple[Throughput, int, str]:
        """The peer's best batch size and order, on a sample of the load's own batches."""
        # Beams stop no row early, so there only sorting by output length makes sense; on a GPU,
        # where a step takes as long as its launches, in greedy search as well.
        orders = ["input", "output"] if decoding is GREEDY and not self.gpu else ["output"]
        best: tuple[Throughput, int, str] | None = None
        for order in orders:
            last = 0.0
            for batch in self.options.batches:
                rate = worker.call(
                    "offline", works, decoding, batch, order, self.options.tune_seconds
                )
                say(
                    f"{name}, {decoding.label}, batches of {batch} by {order}: "
                    f"{rate.tokens_per_s:.0f} tokens/s ({rate.requests} requests)"
                )
                if best is None or rate.tokens_per_s > best[0].tokens_per_s:
                    best = rate, batch, order
                if rate.tokens_per_s < 0.8 * last:
                    break
                last = rate.tokens_per_s
        assert best is not None
        return best

    def _floor(self, name: str, worker: Worker, works: list[Work], decoding: Decoding) -> None:
        if decoding is not GREEDY:
            return
        dtype = name.removeprefix("t5-serve ")
        # At 32 documents, for comparison: an engine of its own with as many slots.
        make = (str(self.path), dtype, "cpu", self.options.threads, 32, False)
        engine = Worker(Ours, *make)
        engine.call("offline", works[: max(len(works) // 2, 8)], decoding)
        step, count = engine.call("step", 32, decoding)
        memory = engine.call("memory")
        engine.close()
        self._memory(dtype, memory)
        if not count:
            return
        floor = Worker(Floor, str(self.path), dtype, self.options.threads)
        bandwidth = floor.call("bandwidth")
        seconds, rate = floor.call("products", 32)
        read = floor.call("cache_bytes", 32, source_seen(works), depth_seen(works))
        floor.close()
        total = seconds + read / bandwidth
        self.result["floor"].append(
            {
                "dtype": dtype, "documents": 32, "steps": count, "step_ms": step * 1e3,
                "floor_ms": total * 1e3, "products_ms": seconds * 1e3, "gflops": rate / 1e9,
                "cache_mb": read / 1e6, "bandwidth_gb_s": bandwidth / 1e9,
            }
        )  # fmt: skip
        self.result["ratios"].append(("step", f"decode step over floor, {dtype}", step / total))

    def _memory(self, dtype: str, memory: dict[str, int]) -> None:
        self.result["memory"].append(
            {"dtype": dtype, **{f"{key}_mb": value / 1e6 for key, value in memory.items()}}
        )
        own = (memory["peak"] - memory["before"]) / (memory["weights"] + memory["caches"])
        self.result["ratios"].append(("memory", f"memory, {dtype}", own))

    def gpu_floor(self) -> None:
        """Steps of batches that are as long, over what reading weights and caches takes."""
        for name, worker in self.ours.items():
            dtype = name.removeprefix("t5-serve ")
            self._memory(dtype, worker.call("memory"))
            bandwidth = worker.call("bandwidth")
            for count in sorted({32, worker.call("rows")}):
                works = [Work(work.ids, 64) for work in mixed(count, self.options.seed + 3)]
                for _ in range(2):
                    worker.call("offline", works, GREEDY)
                step, steps = worker.call("step", count, GREEDY)
                if not steps:
                    continue
                weights, caches = worker.call(
                    "step_bytes", count, source_seen(works), depth_seen(works)
                )
                floor = (weights + caches) / bandwidth
                self.result["floor"].append(
                    {
                        "dtype": dtype, "documents": count, "steps": steps,
                        "step_ms": step * 1e3, "floor_ms": floor * 1e3, "weights_mb": weights / 1e6,
                        "cache_mb": caches / 1e6, "bandwidth_gb_s": bandwidth / 1e9,
                    }
                )  # fmt: skip
                label = f"decode step of {count} over floor, {dtype}"
                self.result["ratios"].append(("step", label, step / floor))

    def poisson(self) -> None:
        """Requests that arrive by themselves, greedy, at shares of the best peer's throughput."""
        if GREEDY.label not in self.best:
            return
        name, batch, rate = self.best[GREEDY.label]
        works = mixed(self.options.poisson_requests, self.options.seed + 2)
        for load in _LOADS[-1:] if self.gpu else _LOADS:
            times = arrivals(len(works), rate * load / 100, self.options.seed)
            rows = []
            for engine, worker in self.ours.items():
                if self.gpu:  # its graphs
                    worker.call("poisson", works, times, GREEDY)
                rows.append(_latency(engine, True, worker.call("poisson", works, times, GREEDY)))
                say(f"{load} %: {rows[-1]}")
            peer = self.peers[name].call("poisson", works, times, GREEDY, batch)
            rows.append(_latency(name, False, peer))
            say(f"{load} %: {rows[-1]}")
            label = f"{load} % of the best peer's {rate:.1f} requests/s"
            self.result["latency"][label] = self.result["poisson"][f"{load} %"] = rows
            if load == _LOADS[-1]:
                self._ratio("p95 at 80 %", f"p95 at {load} %", rows, "p95")

    def copying(self) -> None:
        """Texts whose spans are copied, one after the other; engines take turns at each.

        With the demo model real texts, to wherever it ends; with the copying one random tokens,
        the single request's lengths.
        """
        self.open_ours(8)
        engines = {f"{name}, without lookup": worker for name, worker in self.ours.items()}
        self.ours = {}  # kept open beside those with lookup
        self.open_ours(8, speculation=True)
        engines |= {f"{name}, with lookup": worker for name, worker in self.ours.items()}
        engines |= self.peers
        times: dict[str, list[float]] = {name: [] for name in engines}
        tokens = dict.fromkeys(engines, 0)
        if self.options.model == "demo":
            inputs, least = documents(24), 0
        else:
            inputs, least = distinct(8, self.options.seed), _MOST
        for ids in inputs:
            for name, worker in engines.items():
                calls = [
                    worker.call("free", ids, least, _MOST) for _ in range(self.options.repeats)
                ]
                times[name].append(median(seconds for seconds, _ in calls))
                tokens[name] += calls[0][1]
        self.ours = {name: worker for name, worker in engines.items() if name not in self.peers}
        rows: list[dict[str, Any]] = [
            {
                "engine": name, "ours": "with lookup" in name if name in self.ours else None,
                "mean": sum(seconds) / len(seconds), "tokens": tokens[name],
            }
            for name, seconds in times.items()
        ]  # fmt: skip
        self.result["latency"]["one text alone, greedy"] = rows
        peer = min((row["mean"] for row in rows if row["ours"] is None), default=None)
        for row in rows:
            if row["ours"] and peer:
                self.result["ratios"].append(("copy", row["engine"], row["mean"] / peer))

    def _ratio(self, key: str, label: str, rows: list[dict[str, Any]], figure: str) -> None:
        peers = [row[figure] for row in rows if not row["ours"]]
        for row in rows:
            if row["ours"] and peers:
                ratio = row[figure] / min(peers)
                self.result["ratios"].append((key, f"{label}, {row['engine']}", ratio))


def _speed(name: str, ours: bool, batch: int, tokens: int, seconds: float) -> dict[str, Any]:
    say(f"{name}: {tokens / seconds:.0f} tokens/s")
    return {"engine": name, "ours": ours, "batch": batch, "tokens_per_s": tokens / seconds}


def _latency(name: str, ours: bool, seconds: list[float]) -> dict[str, Any]:
    shares = {f"p{p}": percentile(seconds, p) for p in (50, 95, 99)}
    return {"engine": name, "ours": ours, **shares}


def main() -> int:
    """Run, print the table, save JSON and picture."""
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        path = models.build(options.model, Path(scratch), options.seed)
        converted = models.convert(path, Path(scratch)) if best_types() else None
        bench = Bench(options, path, converted)
        try:
            if options.model in ("demo", "copying"):
                bench.part(bench.copying)
            elif bench.gpu:
                bench.part(bench.open_ours, options.rows)
                bench.part(bench.offline, GREEDY, options.requests)
                bench.part(bench.gpu_floor)
                bench.part(bench.offline, BEAMS, options.beam_requests)
                bench.part(bench.poisson)
                bench.part(bench.single)
                if options.compiled:
                    bench.part(bench.compiled)
            else:
                bench.part(bench.open_ours, options.rows)
                bench.part(bench.single)
                bench.part(bench.offline, GREEDY, options.requests)
                bench.part(bench.poisson)
                bench.part(bench.open_ours, options.rows * BEAMS.beams // 2)
                bench.part(bench.offline, BEAMS, options.beam_requests)
        finally:
            bench.close()
    print(report.table(bench.result))
    if options.plot:
        report.plot(bench.result, options.plot)
    if bench.failed:
        say(f"failed: {', '.join(bench.failed)}")
    return bool(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
