"""The HTTP application: routes, errors, documentation, page."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastapi_offline
from fastapi import Depends, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

import serve_app
from serve_app.api.auth import Authenticate
from serve_app.api.limiter import RateLimiter
from serve_app.api.middleware import DOCS_POLICY, PROBLEM_JSON, RequestMiddleware
from serve_app.api.openapi import describe
from serve_app.api.schemas import known_fields
from serve_app.api.service import SummaryService
from serve_app.api.summarize import router
from serve_app.api.telemetry import Telemetry
from serve_app.config import ApiSettings, RateLimitSettings
from serve_app.errors import (
    BadRequestError,
    MethodNotAllowedError,
    NotFoundError,
    ServiceError,
)
from serve_app.usage.writer import UsageSink

if TYPE_CHECKING:
    from serve_app.tracing.ingress import IngressTracing

_STATIC = Path(__file__).parent / "static"
_DOCS_STATIC = Path(fastapi_offline.__file__).parent / "static"


def create_app(
    service: SummaryService,
    authenticate: Authenticate,
    telemetry: Telemetry,
    settings: ApiSettings,
    *,
    limiter: RateLimiter | None = None,
    usage: UsageSink | None = None,
    echo_request_id: bool = True,
    tracing: IngressTracing | None = None,
) -> FastAPI:
    """Build the ASGI application around a `SummaryService`.

    `usage`, `echo_request_id` and `tracing` are as in `RequestMiddleware`.
    """
    app = FastAPI(
        title="t5-serve",
        version=serve_app.__version__,
        summary="Text summarization with T5",
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = service
    app.state.telemetry = telemetry
    app.state.limiter = limiter or RateLimiter(RateLimitSettings())
    _add_errors(app)
    _add_pages(app)
    _add_health(app, service, settings)

    async def client(request: Request) -> str:
        name = authenticate(request)
        request.state.client = name
        request.state.facts = {"client": name}
        telemetry.entered(name)
        return name

    # HTTPBearer only documents the scheme; `client` is what checks.
    guards = [Depends(client), Depends(HTTPBearer(auto_error=False))]
    app.include_router(router, dependencies=guards)
    app.add_middleware(
        RequestMiddleware,
        telemetry=telemetry,
        usage=usage,
        echo_request_id=echo_request_id,
        tracing=tracing,
    )
    describe(app, service.limits)
    return app


def problem_response(error: ServiceError, request: Request) -> Response:
    """The RFC 9457 answer for an error."""
    document = error.problem(request.state.request_id)
    return JSONResponse(document, int(error.status), headers=error.headers, media_type=PROBLEM_JSON)


def _add_errors(app: FastAPI) -> None:
    async def service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        request.app.state.telemetry.failed(error)
        request.state.facts = {
            **getattr(request.state, "facts", {}),
            "error_type": error.kind,
            "error_fields": known_fields(field.field for field in error.errors),
        }
        return problem_response(error, request)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return await service_error(request, _from_http(error, request))

    app.add_exception_handler(ServiceError, service_error)
    app.add_exception_handler(HTTPException, http_error)


def _from_http(error: HTTPException, request: Request) -> ServiceError:
    """Errors of the framework itself (no route, wrong method) in our own terms."""
    headers = {name.replace("-", "_"): value for name, value in (error.headers or {}).items()}
    path = request.url.path
    if error.status_code == HTTPStatus.NOT_FOUND:
        return NotFoundError(f"no such path: {path[:200]}")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return MethodNotAllowedError(f"{request.method} is not allowed here", [], **headers)
    result = BadRequestError(str(error.detail))
    result.status = HTTPStatus(error.status_code)
    return result


def _add_pages(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.mount("/docs-static", StaticFiles(directory=_DOCS_STATIC), name="docs-static")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "")
        response = get_swagger_ui_html(
            openapi_url=f"{root}/openapi.json",
            title="t5-serve: API",
            swagger_js_url=f"{root}/docs-static/swagger-ui-bundle.js",
            swagger_css_url=f"{root}/docs-static/swagger-ui.css",
            swagger_favicon_url=f"{root}/static/favicon.svg",
        )
        response.headers["Content-Security-Policy"] = DOCS_POLICY
        return response


def _add_health(app: FastAPI, service: SummaryService, settings: ApiSettings) -> None:
    @app.get("/healthz", tags=["health"], summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], summary="An engine step really completed lately")
    async def readyz() -> dict[str, Any]:
        probe = await service.backend.probe(settings.ready_step_age_s)
        return {
            "status": "ready",
            "step_age_s": round(probe.step_age_s, 3),
            "waiting_requests": probe.load.waiting_requests,
            "waiting_tokens": probe.load.waiting_tokens,
            "running_requests": probe.load.running_requests,
        }
