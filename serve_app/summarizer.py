"""The Summarizer deployment: one engine per replica, asked through a `DeploymentHandle`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

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
    Stopped,
    Tokens,
)
from serve_app.logs import configure_logging, request_id_var, trace_id_var
from serve_app.metrics.engine import EngineMetrics
from serve_app.metrics.exporter import Exporter
from serve_app.metrics.series import ENGINE_SERIES
from serve_app.usage.events import trace_id

if TYPE_CHECKING:
    from serve_app.tracing.replica import CallSpan, ReplicaTracing

logger = logging.getLogger(__name__)

_PROBE = "probe-"
# Seconds after which a thread gives Python's lock to another that wants it. The engine's thread
# always wants it, and a call takes it several times: each would wait for Python's 5 ms.
_SWITCH_S = 0.0005


class Summarizer:
    """Runs encoder inputs through the engine. Wrapped as a deployment in `serve_app.app`."""

    # Serve awaits an async constructor.
    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        # Imported here, in the replica: whoever only deploys this class need not load torch.
        from serve_app.engine.build import build_engine

        self._settings = ServiceSettings.model_validate(settings)
        configure_logging(self._settings.log)
        sys.setswitchinterval(_SWITCH_S)
        self._tracing = self._open_tracing()
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
        self._exporter = Exporter(ENGINE_SERIES)
        self._metrics = EngineMetrics(self._exporter)
        self._ready = False
        self._client = EngineClient(make, on_event=self._count)
        self._probe_ids = [checkpoint.eos_id]
        self._probing: asyncio.Task[None] | None = None
        await self._warm_up()
        self._exporting = asyncio.create_task(
            self._exporter.run(lambda: self._metrics.load(self._client.load()))
        )
        self._ready = True
        logger.info("engine ready", extra={"model": model.name, "pid": os.getpid()})

    async def run(self, call: Call) -> Outcome:
        """Run one encoder input to its end."""
        with self._traced(call) as span:
            try:
                outcome: Outcome = await self._client.run(_request(call, stream=False))
            except (QueueFullError, EngineStoppedError) as error:
                outcome = self._refused(call, error)
            self._over(outcome, span)
            return outcome

    async def stream(self, call: Call) -> AsyncGenerator[Tokens | Outcome]:
        """Run one encoder input, giving its tokens as they come; the outcome is last."""
        with self._traced(call) as span:
            try:
                async with aclosing(self._client.events(_request(call, stream=True))) as events:
                    async for event in events:
                        if not isinstance(event, Tokens):
                            self._over(event, span)
                        elif span is not None:
                            span.tokens()
                        yield event
            except (QueueFullError, EngineStoppedError) as error:
                outcome = self._refused(call, error)
                self._over(outcome, span)
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

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve some times in each look-back, for `scaling.TokenPolicy`."""
        work = self._client.work()
        return {} if work is None else asdict(work)

    async def check_health(self) -> None:
        """Called by Serve: fails when the engine has broken down, or hangs (ray#61263)."""
        reason = self._client.stalled(self._settings.engine.stall_s)
        if reason is not None:
            raise RuntimeError(f"unhealthy engine: {reason}")

    def __del__(self) -> None:
        client = getattr(self, "_client", None)
        if client is not None:
            client.close()
        tracing = getattr(self, "_tracing", None)
        if tracing is not None:
            tracing.close()

    def _open_tracing(self) -> ReplicaTracing | None:
        if self._settings.tracing.endpoint is None:
            return None
        from serve_app.tracing.replica import ReplicaTracing
        from serve_app.tracing.serve import provider_of_replica

        provider = provider_of_replica(self._settings.tracing, "t5-serve-summarizer")
        return ReplicaTracing(provider, self._settings.model.name)

    def _traced(self, call: Call) -> AbstractContextManager[CallSpan | None]:
        """Begin a call: its logs have its request's id, and its trace a span, where that is on."""
        request_id_var.set(call.request_id)
        trace_id_var.set(trace_id(call.traceparent) or "")
        return nullcontext() if self._tracing is None else self._tracing.call(call)

    def _over(self, outcome: Outcome, span: CallSpan | None) -> None:
        if span is not None:
            span.end(outcome)
        if isinstance(outcome, Failed) and outcome.reason is FailureReason.ERROR:
            logger.error("the engine failed on a call", extra={"reason": outcome.message})

    async def _warm_up(self) -> None:
        settings = GenerationSettings(max_new_tokens=1)
        request = EngineRequest(f"{_PROBE}{uuid.uuid4().hex}", self._probe_ids, settings)
        outcome = await self._client.run(request)
        if isinstance(outcome, Failed):
            raise RuntimeError(f"the engine fails on an empty text: {outcome.message}")

    def _count(self, event: BatchRan | Finished | Failed | Stopped) -> None:
        if isinstance(event, Stopped):
            if self._ready:
                self._die(event)
        elif not event.id.startswith(_PROBE):
            self._metrics.event(event)

    def _die(self, event: Stopped) -> None:
        """End this process: its engine has stopped, or its device is lost to it.

        At once, and not by Serve's health check, which takes three periods to be sure: a replica
        that fails every call at once looks like the least busy one until then, and gets them all.
        Callers see a replica die, and try another.
        """
        logger.critical("this replica ends", extra={"reason": event.message, "pid": os.getpid()})
        self._exporter.flush()
        os._exit(1)

    def _refused(self, call: Call, error: QueueFullError | EngineStoppedError) -> Outcome:
        if isinstance(error, QueueFullError):
            self._metrics.rejected(error.outcome)
            return Rejected(error.message, error.retry_after_s, error.late_s)
        failed = Failed(call.id, FailureReason.STOPPED, str(error))
        self._metrics.event(failed)
        return failed


def _request(call: Call, *, stream: bool) -> EngineRequest:
    deadline = time.monotonic() + call.timeout_s
    return EngineRequest(
        call.id, call.input_ids, call.settings, deadline, stream, call.share, call.request_id
    )
