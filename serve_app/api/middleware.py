"""Around every request: id, usage event and metrics, security headers, last-resort errors."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.telemetry import Telemetry
from serve_app.errors import ServiceError
from serve_app.logs import request_id_var, trace_id_var
from serve_app.usage.events import trace_id, usage_event
from serve_app.usage.writer import UsageSink

if TYPE_CHECKING:
    from serve_app.tracing.ingress import IngressTracing, RequestSpan

logger = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

# The page and its assets come from here and talk to here, and nothing else does.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI is started by an inline script and styles itself inline.
DOCS_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # an upgraded page must not meet an old script
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": PAGE_POLICY,
}


class RequestMiddleware:
    """Outermost ASGI layer.

    Args:
        app: the application inside.
        telemetry: where finished requests are counted.
        usage: where their usage events go. None: to the log, as INFO. The log has them in any
            case, but otherwise as DEBUG: what is in the files need not be kept twice.
        echo_request_id: whether to send `X-Request-Id` back. Serve's HTTP proxy already echoes the
            id it passes on, so behind it only an id made here needs a header of its own.
        tracing: what makes the requests' spans. None: there are none.
    """

    def __init__(
        self,
        app: ASGIApp,
        telemetry: Telemetry,
        usage: UsageSink | None,
        echo_request_id: bool,
        tracing: IngressTracing | None = None,
    ) -> None:
        self._app = app
        self._telemetry = telemetry
        self._usage = usage
        self._echo = echo_request_id
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        well_formed = _REQUEST_ID.fullmatch(given) is not None
        request_id = given if well_formed else uuid.uuid4().hex
        request_id_var.set(request_id)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        span = None if self._tracing is None else self._tracing.request(scope)
        traceparent = span.traceparent if span else Headers(scope=scope).get("traceparent", "")
        trace_id_var.set(trace_id(traceparent) or "")
        seen = _Seen(traceparent)

        async def receive_counted() -> Message:
            try:
                message = await receive()
            except TaskCancelledError:  # how Serve's proxy says that the client has left
                return {"type": "http.disconnect"}
            seen.request_bytes += len(message.get("body", b""))
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = MutableHeaders(scope=message)
                if self._echo or not well_formed:
                    headers["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if (turn := state.get("turn")) is not None:
                    headers.update(turn.headers())
            seen.response_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive_counted, send_with_headers)
        except ClientDisconnect:
            logger.debug("the client left before its body was read")
        except Exception:
            logger.exception("unhandled error")
            if seen.status:
                raise
            problem = ServiceError("an unexpected error; the log has it under this request id")
            body = json.dumps(problem.problem(request_id)).encode()
            start = {
                "type": "http.response.start",
                "status": 500,
                "headers": [(b"content-type", PROBLEM_JSON.encode())],
            }
            await send_with_headers(start)
            state["facts"] = {**state.get("facts", {}), "error_type": problem.kind}
            await send_with_headers({"type": "http.response.body", "body": body})
        finally:
            self._done(scope, seen, span)

    def _done(self, scope: Scope, seen: _Seen, span: RequestSpan | None) -> None:
        milliseconds = (time.monotonic() - seen.began) * 1e3
        facts = scope["state"].get("facts", {})
        if (turn := scope["state"].get("turn")) is not None:
            turn.leave(facts.get("input_tokens", 0) + facts.get("output_tokens", 0))
        # 499: the client went away before the first byte.
        status = seen.status or 499
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        facts = scope["state"].get("facts", {})
        self._telemetry.request(route, status, milliseconds)
        if (client := facts.get("client")) is not None:
            tokens = facts.get("input_tokens", 0), facts.get("output_tokens", 0)
            self._telemetry.left(client, status, *tokens)
        event = usage_event(
            request_id=scope["state"]["request_id"],
            traceparent=seen.traceparent,
            method=scope["method"],
            route=route,
            status=status,
            total_ms=milliseconds,
            request_bytes=seen.request_bytes,
            response_bytes=seen.response_bytes,
            facts=facts,
        )
        if span is not None:
            span.end(event)
        probe = route in ("/healthz", "/readyz") and status < 400
        if self._usage is not None and not probe:
            self._usage.record(event)
        level = logging.INFO if self._usage is None and not probe else logging.DEBUG
        if logger.isEnabledFor(level):
            logger.log(level, "request", extra=_extra(event))


@dataclass(slots=True)
class _Seen:
    """What passed by of a request: bytes of bodies, without headers."""

    traceparent: str
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    request_bytes: int = 0
    response_bytes: int = 0


def _extra(event: dict[str, Any]) -> dict[str, Any]:
    """The event without what every log line has of itself."""
    return {name: event[name] for name in event if name not in ("time", "severity", "message")}
