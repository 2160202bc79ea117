"""The Summarizer deployment: one engine per replica, asked through a `DeploymentHandle`."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import ray
from ray.serve import metrics

from serve_app.calls import Call, Outcome, Probe, Rejected
from serve_app.config import ServiceSettings
from serve_app.engine.checkpoint import resolve
from serve_app.engine.client import EngineClient
from serve_app.engine.protocol import (
    BatchRan,
    EngineRequest,
    EngineStoppedError,
    Failed,
    FailureReason,
    Finished,
    GenerationSettings,
    QueueFullError,
    Tokens,
)
from serve_app.logs import configure_logging

logger = logging.getLogger(__name__)

_MS: list[float] = [
    1,
    2,
    5,
    10,
    25,
    50,
    100,
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    30_000,
    60_000,
    120_000,
]
_SIZES: list[float] = [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256]
_GAUGE_PERIOD_S = 1.0


class _Metrics:
    """Prometheus series of one replica; Ray adds deployment, replica and application labels."""

    def __init__(self) -> None:
        self.batch_size = metrics.Histogram(
            "t5_batch_size", description="Requests per batch through the model.", boundaries=_SIZES
        )
        # Ray exports a histogram's sum from the middles of its buckets; means need counters.
        self.batches = metrics.Counter("t5_batches", description="Batches through the model.")
        self.batched = metrics.Counter(
            "t5_batched_requests", description="Requests in those batches; mean size = ratio."
        )
        self.batch_seconds = metrics.Counter(
            "t5_compute_seconds", description="Wall seconds spent in the model."
        )
        self.tokens = metrics.Counter(
            "t5_tokens", description="Tokens through the model.", tag_keys=("kind",)
        )
        self.queue_ms = metrics.Histogram(
            "t5_queue_ms", description="Wait in the engine's queue.", boundaries=_MS
        )
        self.compute_ms = metrics.Histogram(
            "t5_compute_ms", description="Time of a request in the model.", boundaries=_MS
        )
        self.drafts = metrics.Counter(
            "t5_draft_tokens",
            description="Looked-up tokens tried ahead, and those that were right.",
            tag_keys=("kind",),
        )
        self.outcomes = metrics.Counter(
            "t5_engine_requests", description="Engine requests by outcome.", tag_keys=("outcome",)
        )
        self.waiting = metrics.Gauge("t5_waiting_requests", description="Requests waiting.")
        self.waiting_tokens = metrics.Gauge("t5_waiting_tokens", description="Tokens waiting.")
        self.running = metrics.Gauge("t5_running_requests", description="Requests in the model.")

    def batch(self, ran: BatchRan) -> None:
        self.batch_size.observe(ran.requests)
        self.batches.inc(1)
        self.batched.inc(ran.requests)
        self.batch_seconds.inc(max(ran.seconds, 1e-9))
        for counter, kind, count in (
            (self.tokens, "input", ran.input_tokens),
            (self.tokens, "output", ran.output_tokens),
            (self.drafts, "tried", ran.drafted),
            (self.drafts, "accepted", ran.accepted),
        ):
            # Ray's counters refuse an increment of zero; most steps encode nothing.
            if count:
                counter.inc(count, tags={"kind": kind})

    def outcome(self, outcome: Outcome) -> None:
        if isinstance(outcome, Finished):
            self.queue_ms.observe(max(outcome.usage.queue_ms, 1e-3))
            self.compute_ms.observe(max(outcome.usage.compute_ms, 1e-3))
            name = "finished"
        else:
            name = outcome.reason.value if isinstance(outcome, Failed) else "rejected"
        self.outcomes.inc(1, tags={"outcome": name})


class Summarizer:
    """Runs encoder inputs through the engine. Wrapped as a deployment in `serve_app.app`."""

    # Serve awaits an async constructor.
    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        # Imported here, in the replica: whoever only deploys this class need not load torch.
        from serve_app.engine.build import build_engine

        self._settings = ServiceSettings.model_validate(settings)
        configure_logging(self._settings.log)
        model = self._settings.model
        checkpoint = await asyncio.to_thread(resolve, model.name, model.revision)
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
        make = partial(
            build_engine,
            checkpoint,
            model=self._settings.model,
            engine=self._settings.engine,
            cpus=max(int(cpus), 1),
        )
        self._metrics = _Metrics()
        self._client = EngineClient(make, on_batch=self._metrics.batch)
        self._probe_ids = [checkpoint.eos_id]
        self._probing: asyncio.Task[None] | None = None
        await self._warm_up()
        self._gauges = asyncio.create_task(self._report_gauges())
        logger.info("engine ready", extra={"model": model.name, "pid": os.getpid()})

    async def run(self, call: Call) -> Outcome:
        """Run one encoder input to its end."""
        try:
            outcome: Outcome = await self._client.run(_request(call, stream=False))
        except (QueueFullError, EngineStoppedError) as error:
            outcome = self._refused(call, error)
        self._metrics.outcome(outcome)
        return outcome

    async def stream(self, call: Call) -> AsyncGenerator[Tokens | Outcome]:
        """Run one encoder input, giving its tokens as they come; the outcome is last."""
        try:
            async with aclosing(self._client.events(_request(call, stream=True))) as events:
                async for event in events:
                    if not isinstance(event, Tokens):
                        self._metrics.outcome(event)
                    yield event
        except (QueueFullError, EngineStoppedError) as error:
            outcome = self._refused(call, error)
            self._metrics.outcome(outcome)
            yield outcome

    async def probe(self, max_age_s: float) -> Probe:
        """Give proof of a completed step no older than `max_age_s`, making one if need be."""
        age = self._client.load().last_step_age_s
        if age is None or age > max_age_s:
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(self._warm_up())
            await asyncio.shield(self._probing)
        load = self._client.load()
        return Probe(load.last_step_age_s or 0.0, load, os.getpid())

    async def check_health(self) -> None:
        """Called by Serve: fails when the engine is busy but makes no progress (ray#61263)."""
        reason = self._client.stalled(self._settings.engine.stall_s)
        if reason is not None:
            raise RuntimeError(f"unhealthy engine: {reason}")

    def __del__(self) -> None:
        client = getattr(self, "_client", None)
        if client is not None:
            client.close()

    async def _warm_up(self) -> None:
        settings = GenerationSettings(max_new_tokens=1)
        request = EngineRequest(f"probe-{uuid.uuid4().hex}", self._probe_ids, settings)
        outcome = await self._client.run(request)
        if isinstance(outcome, Failed):
            raise RuntimeError(f"the engine fails on an empty text: {outcome.message}")

    def _refused(self, call: Call, error: QueueFullError | EngineStoppedError) -> Outcome:
        if isinstance(error, QueueFullError):
            return Rejected(error.message, error.load)
        return Failed(call.id, FailureReason.CANCELLED, str(error))

    async def _report_gauges(self) -> None:
        while True:
            load = self._client.load()
            self._metrics.waiting.set(load.waiting_requests)
            self._metrics.waiting_tokens.set(load.waiting_tokens)
            self._metrics.running.set(load.running_requests)
            await asyncio.sleep(_GAUGE_PERIOD_S)


def _request(call: Call, *, stream: bool) -> EngineRequest:
    deadline = time.monotonic() + call.timeout_s
    return EngineRequest(call.id, call.input_ids, call.settings, deadline, stream, call.share)
