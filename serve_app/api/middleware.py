"""Around every request: its id, its log line and metrics, security headers, last-resort errors."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.telemetry import Telemetry
from serve_app.errors import ServiceError
from serve_app.logs import request_id_var

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
        echo_request_id: whether to send `X-Request-Id` back. Serve's HTTP proxy already echoes the
            id it passes on, so behind it only an id made here needs a header of its own.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry, echo_request_id: bool) -> None:
        self._app = app
        self._telemetry = telemetry
        self._echo = echo_request_id

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
        began = time.monotonic()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if self._echo or not well_formed:
                    headers["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            logger.exception("unhandled error")
            if status:
                raise
            problem = ServiceError("an unexpected error; the log has it under this request id")
            body = json.dumps(problem.problem(request_id)).encode()
            start = {
                "type": "http.response.start",
                "status": 500,
                "headers": [(b"content-type", PROBLEM_JSON.encode())],
            }
            await send_with_headers(start)
            await send({"type": "http.response.body", "body": body})
        finally:
            # 499: the client went away before the first byte.
            self._done(scope, status or 499, (time.monotonic() - began) * 1e3)

    def _done(self, scope: Scope, status: int, milliseconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        self._telemetry.request(route, status, milliseconds)
        facts = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "duration_ms": round(milliseconds, 2),
            **scope["state"].get("facts", {}),
        }
        quiet = route in ("/healthz", "/readyz") and status < 400
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra=facts)
