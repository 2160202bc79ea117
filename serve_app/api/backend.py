"""The Summarizer as the ingress sees it, over a Ray Serve `DeploymentHandle`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve_app.api.gate import Gate
from serve_app.api.suspects import Suspects, Trial
from serve_app.calls import Call, Outcome, Probe, Rejected
from serve_app.config import Limits
from serve_app.engine.protocol import Failed, FailureReason, Finished, Tokens
from serve_app.errors import (
    DeadlineError,
    EngineError,
    LostError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)
from serve_app.logs import request_id_var

if TYPE_CHECKING:
    from serve_app.tracing.ingress import IngressTracing

logger = logging.getLogger(__name__)

_GONE = (RayActorError, ReplicaUnavailableError, LostError)


class RayBackend:
    """Implements `serve_app.calls.Backend`. With `tracing` each attempt of a call has a span."""

    def __init__(
        self, handle: DeploymentHandle[Any], limits: Limits, tracing: IngressTracing | None = None
    ) -> None:
        self._run = handle.options(method_name="run")
        self._stream = handle.options(method_name="stream", stream=True)
        self._probe = handle.options(method_name="probe")
        self._limits = limits
        self._tracing = tracing
        self._gate = Gate()
        self._suspects = Suspects()

    async def run(self, call: Call) -> Finished:
        """See `Backend.run`. A call whose replica dies is run once more elsewhere."""
        if (refusal := self._gate.refusal(call)) is not None:
            return finished(refusal, self._limits)
        ends = time.monotonic() + call.timeout_s
        async with self._suspects.trial(call) as trial:
            for last in (False, True):
                try:
                    with self._attempt(call, ends) as sent:
                        response = self._run.remote(sent)
                        try:
                            outcome = await response
                        except asyncio.CancelledError:
                            response.cancel()  # type: ignore[no-untyped-call]
                            raise
                        self._gate.saw(sent, outcome)
                        output = finished(outcome, self._limits)
                except Exception as error:
                    self._gone(error, trial, last=last)
                else:
                    trial.succeeded()
                    return output
        raise AssertionError("unreachable")

    async def stream(self, call: Call) -> AsyncGenerator[Tokens | Finished]:
        """See `Backend.stream`. Tried once more only while nothing has been streamed."""
        if (refusal := self._gate.refusal(call)) is not None:
            yield finished(refusal, self._limits)
        ends = time.monotonic() + call.timeout_s
        async with self._suspects.trial(call) as trial:
            for last in (False, True):
                started = False
                try:
                    with self._attempt(call, ends) as sent:
                        response = cast(
                            "DeploymentResponseGenerator[Any]", self._stream.remote(sent)
                        )
                        outcome: Outcome | None = None
                        try:
                            async for event in response:
                                if not isinstance(event, Tokens):
                                    outcome = event
                                    break
                                started = True
                                yield event
                        except (asyncio.CancelledError, GeneratorExit):
                            response.cancel()
                            raise
                        assert outcome is not None, "a stream ends with its outcome"
                        self._gate.saw(sent, outcome)
                        output = finished(outcome, self._limits)
                except Exception as error:
                    self._gone(error, trial, last=last or started)
                else:
                    # Outside of the span: a reader that has its result may close this generator.
                    trial.succeeded()
                    yield output
                    return

    async def probe(self, max_age_s: float) -> Probe:
        """See `Backend.probe`. Waits no longer than a step may be old."""
        try:
            async with asyncio.timeout(max_age_s):
                probe: Probe = await self._probe.remote(max_age_s)
        except TimeoutError:
            raise UnavailableError(f"no engine made a step within {max_age_s:g} s") from None
        except Exception as error:
            self._translate(error)
        return probe

    def _gone(self, error: Exception, trial: Trial, *, last: bool) -> None:
        """After an error: returns if the call is to be tried once more.

        Raises:
            ServiceError: it is not.
        """
        if isinstance(error, ActorDiedError):
            trial.died(last=last)
        if last or not isinstance(error, _GONE):
            self._translate(error)
        logger.warning("a replica died under a request; trying another")

    def _attempt(self, call: Call, ends: float) -> AbstractContextManager[Call]:
        """The call as it is sent: what is left of its time, its request's id, and its trace."""
        left = max(ends - time.monotonic(), 0.001)
        sent = replace(call, timeout_s=left, request_id=request_id_var.get())
        return nullcontext(sent) if self._tracing is None else self._tracing.call(sent)

    def _translate(self, error: Exception) -> NoReturn:
        if isinstance(error, ServiceError):
            raise error
        if isinstance(error, BackPressureError):
            raise OverloadedError(
                "every replica is at its limit of ongoing requests",
                self._limits.full_status,
                error.retry_after_s or 1,
                self._limits.max_retry_after_s,
            ) from error
        if isinstance(error, (*_GONE, DeploymentUnavailableError)):
            detail = "every replica that worked on this request died"
            if isinstance(error, DeploymentUnavailableError):
                detail = "the summarizer has no healthy replica"
            unavailable = UnavailableError(detail, Retry_After="5")
            if isinstance(error, _GONE):
                unavailable.usage = None
            raise unavailable from error
        if isinstance(error, RayTaskError):
            logger.error("the summarizer raised", exc_info=error)
            failed = EngineError("the summarizer failed; its log has the cause")
            failed.usage = None
            raise failed from error
        raise error


def finished(outcome: Outcome, limits: Limits) -> Finished:
    """The result, or the `ServiceError` that says why there is none."""
    if isinstance(outcome, Finished):
        return outcome
    if isinstance(outcome, Rejected):
        raise OverloadedError(
            outcome.message,
            limits.full_status,
            outcome.retry_after_s,
            limits.max_retry_after_s,
        )
    assert isinstance(outcome, Failed)
    error: ServiceError
    if outcome.reason is FailureReason.DEADLINE:
        error = DeadlineError("the request's deadline passed before the summary was done")
    elif outcome.reason is FailureReason.STOPPED:
        error = LostError(outcome.message, Retry_After="5")
    elif outcome.reason is FailureReason.CANCELLED:
        error = UnavailableError("the replica is shutting down", Retry_After="1")
    else:
        error = EngineError(f"the engine failed on this text: {outcome.message}")
    error.usage = outcome.usage
    raise error
