"""Our engine, in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from statistics import median
from typing import Any

from bench.engine.figures import latencies
from bench.engine.progress import Progress
from bench.engine.workloads import Decoding, Work


class Ours:
    """The continuous engine behind its asyncio client, as the service uses it.

    Args:
        path: checkpoint folder.
        dtype: `float32`, `bfloat16` or `int8`.
        device: torch device.
        threads: CPU threads.
        rows: of the running batch.
        speculation: whether greedy requests may be advanced by lookup.
    """

    def __init__(
        self, path: str, dtype: str, device: str, threads: int, rows: int, speculation: bool
    ) -> None:
        from serve_app.engine.checkpoint import resolve
        from serve_app.engine.client import EngineClient
        from serve_app.engine.continuous import ContinuousEngine
        from serve_app.engine.protocol import BatchRan

        self._gpu = device != "cpu"
        self._rss_before = resident("VmRSS")
        self._batches: list[BatchRan] = []
        self._ids = itertools.count()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

        async def open_client() -> EngineClient:
            def make(emit: Any) -> ContinuousEngine:
                self._engine = ContinuousEngine(
                    resolve(path), emit, device=device, dtype=dtype, threads=threads,
                    max_batch_size=rows, max_waiting_requests=100_000,
                    max_waiting_tokens=100_000_000, speculation=speculation,
                )  # fmt: skip
                return self._engine

            def seen(event: object) -> None:
                if isinstance(event, BatchRan):
                    self._batches.append(event)

            return EngineClient(make, seen)

        self._client = self._run(open_client())

    def close(self) -> None:
        """Stop the engine."""
        self._client.close()

    def offline(self, works: list[Work], decoding: Decoding) -> float:
        """Seconds for all requests, submitted at once in the order they come."""
        self._batches.clear()
        began = time.perf_counter()
        self.poisson(works, [0.0] * len(works), decoding)
        return time.perf_counter() - began

    def alone(self, work: Work, decoding: Decoding) -> float:
        """Seconds for one request."""
        return self.offline([work], decoding)

    def poisson(self, works: list[Work], times: list[float], decoding: Decoding) -> list[float]:
        """Latencies in seconds of requests that arrive at these times."""
        from serve_app.engine.protocol import Finished

        progress = Progress("t5-serve", len(works))

        async def one(work: Work, at: float) -> float:
            await asyncio.sleep(began + at - time.perf_counter())
            outcome = await self._client.run(self._request(work, decoding))
            if not isinstance(outcome, Finished):
                raise RuntimeError(f"a request failed: {outcome.message}")
            progress.done(work)
            return time.perf_counter() - began

        async def everyone() -> list[float]:
            return await asyncio.gather(*(one(*pair) for pair in zip(works, times, strict=True)))

        began = time.perf_counter()
        return latencies(self._run(everyone()), times)

    def free(self, ids: list[int], least: int, most: int) -> tuple[float, int]:
        """Greedy, to wherever the model ends: seconds, and output tokens, the end among them."""
        from serve_app.engine.protocol import EngineRequest, GenerationSettings

        settings = GenerationSettings(min_new_tokens=least, max_new_tokens=most)
        request = EngineRequest(f"{next(self._ids)}", ids, settings)
        began = time.perf_counter()
        outcome = self._run(self._client.run(request))
        return time.perf_counter() - began, min(len(outcome.ids) + 1, most)

    def step(self, documents: int, decoding: Decoding) -> tuple[float, int]:
        """Of the last `offline`: median seconds of a step that encoded nothing, with this many
        documents, and how many there were."""
        steps = [
            batch.seconds
            for batch in self._batches
            if batch.requests == documents and not batch.input_tokens
        ]
        return (median(steps), len(steps)) if steps else (0.0, 0)

    def rows(self) -> int:
        """Of the running batch."""
        return self._engine.load().slots

    def memory(self) -> dict[str, int]:
        """Bytes: peak resident, resident before the model was loaded, weights, planned caches.

        On a GPU what torch has taken of its memory: neither its libraries nor the driver's.
        """
        import torch

        runner: Any = self._engine._runner
        return {
            "peak": torch.cuda.max_memory_reserved() if self._gpu else resident("VmHWM"),
            "before": 0 if self._gpu else self._rss_before,
            "weights": runner.weight_bytes,
            "caches": runner.cache_bytes,
        }

    def bandwidth(self) -> float:
        """Bytes per second that a copy within the GPU's memory reads and writes together."""
        import torch

        source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        times = []
        for _ in range(12):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        del source, target
        torch.cuda.empty_cache()
        return 2 * (1 << 30) / median(times[2:])

    def step_bytes(self, documents: int, source: float, depth: float) -> tuple[float, float]:
        """What a greedy step must read at least: weights, and keys and values."""
        runner: Any = self._engine._runner
        model, shape = runner._model, runner.shape
        inner = shape.heads * shape.head_width
        kept = documents * shape.decoder_layers * 2 * inner * (source + depth)
        return model.step_bytes, kept * model.dtype.itemsize

    def _request(self, work: Work, decoding: Decoding) -> Any:
        from serve_app.engine.protocol import EngineRequest, GenerationSettings

        settings = GenerationSettings(
            num_beams=decoding.beams,
            min_new_tokens=work.tokens,
            max_new_tokens=work.tokens,
            no_repeat_ngram_size=decoding.ngram,
        )
        return EngineRequest(f"{next(self._ids)}", work.ids, settings)

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes: `VmRSS` or `VmHWM` (its peak)."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) * 1024
