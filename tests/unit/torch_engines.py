"""Continuous engines on the torch runner, wherever it runs, and what they make of requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.gpu.graphs import StepGraphs
from serve_app.engine.gpu.runner import TorchRunner
from serve_app.engine.protocol import EngineRequest, Finished, GenerationSettings
from serve_app.engine.runner import Plan


class Engine(ContinuousEngine):
    """A continuous engine on the torch runner, wherever it runs; `graphs` can be done without."""

    graphs = True

    def _make_runner(self, checkpoint: Checkpoint, plan: Plan) -> TorchRunner:  # type: ignore[override]
        runner = TorchRunner(checkpoint, replace(plan, rounded=True))
        if not self.graphs:
            runner._graphs = None
        return runner


class Eager(Engine):
    graphs = False


class Recorded(Engine):
    """With graphs on a CPU, where `recorded_graphs` plays them."""

    def _make_runner(self, checkpoint: Checkpoint, plan: Plan) -> TorchRunner:  # type: ignore[override]
        runner = super()._make_runner(checkpoint, plan)
        runner._graphs = StepGraphs(runner._run)
        return runner


@asynccontextmanager
async def running(
    checkpoint: Checkpoint, kind: type[Engine] = Engine, **options: Any
) -> AsyncIterator[tuple[EngineClient, list[Any]]]:
    seen: list[Any] = []
    client = EngineClient(lambda emit: kind(checkpoint, emit, threads=1, **options), seen.append)
    try:
        yield client, seen
    finally:
        await asyncio.to_thread(client.close)
        # Freed now, and not by the garbage collector while the next engine captures a graph.
        runner: Any = client._engine._runner  # type: ignore[attr-defined]
        runner._groups.clear()
        runner._flights.clear()
        runner._graphs = None


async def outputs(
    client: EngineClient, inputs: Sequence[list[int]], asked: Sequence[GenerationSettings]
) -> list[list[int]]:
    """What an engine makes of requests that come at once."""
    requests = [
        EngineRequest(f"{i}", ids, settings)
        for i, (ids, settings) in enumerate(zip(inputs, asked, strict=True))
    ]
    outcomes = await asyncio.gather(*map(client.run, requests))
    assert [one for one in outcomes if not isinstance(one, Finished)] == []
    return [list(one.ids) for one in outcomes]


async def outputs_at_once(
    client: EngineClient, inputs: Sequence[list[int]], asked: Sequence[GenerationSettings]
) -> list[list[int]]:
    """See `outputs`; the engine does not begin before it has all of them."""
    engine: Any = client._engine
    with engine._lock:  # this thread, on which requests are submitted, may take it again
        task = asyncio.create_task(outputs(client, inputs, asked))
        while len(engine._waiting) < len(inputs) and not task.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
    return await task
