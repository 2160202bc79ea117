"""The Api deployment: the HTTP application inside a Ray Serve replica."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.api.app import create_app
from serve_app.api.auth import authenticator
from serve_app.api.backend import RayBackend
from serve_app.api.limiter import News, RateLimiter
from serve_app.api.peers import tell_peers
from serve_app.api.service import SummaryService
from serve_app.api.telemetry import ServeTelemetry
from serve_app.config import RateLimitSettings, ServiceSettings
from serve_app.engine.checkpoint import resolve
from serve_app.logs import configure_logging
from serve_app.usage.folder import default_usage_folder
from serve_app.usage.writer import UsageWriter

if TYPE_CHECKING:
    from serve_app.tracing.ingress import IngressTracing


@serve.ingress()
class Api:
    """CPU ingress: takes HTTP, asks the Summarizer through its handle."""

    async def __init__(  # type: ignore[misc]  # Serve awaits an async constructor
        self, settings: dict[str, Any], summarizer: DeploymentHandle[Any]
    ) -> None:
        self._settings = ServiceSettings.model_validate(settings)
        configure_logging(self._settings.log)
        self._tracing = self._open_tracing()
        model = self._settings.model
        checkpoint = await asyncio.to_thread(resolve, model.name, model.revision)
        self._service = SummaryService(
            checkpoint,
            RayBackend(summarizer, self._settings.limits, self._tracing),
            self._settings.limits,
            self._settings.api,
            model.max_input_tokens,
        )

        self._telemetry = ServeTelemetry()
        self._usage = self._usage_writer()
        self._limiter = RateLimiter(RateLimitSettings(), self._telemetry.rate_limited)
        self._telling = asyncio.create_task(tell_peers(self._limiter))

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Called by Serve with the deployment's `user_config`, at first and when it changes."""
        settings = RateLimitSettings.model_validate(config["rate_limits"])
        self._limiter.configure(settings)

    def heard(self, replica: str, news: News) -> None:
        """Called by the other replicas, and this one: what clients have used."""
        if replica != serve.get_replica_context().replica_id.unique_id:
            self._limiter.heard(replica, news)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica has been constructed."""
        return create_app(
            self._service,
            authenticator(self._settings.auth),
            self._telemetry,
            self._settings.api,
            limiter=self._limiter,
            usage=self._usage,
            echo_request_id=False,
            tracing=self._tracing,
        )

    def __del__(self) -> None:
        """Called by Serve once the replica has answered its last request."""
        usage = getattr(self, "_usage", None)
        if usage is not None:
            usage.close()
        tracing = getattr(self, "_tracing", None)
        if tracing is not None:
            tracing.close()

    def _open_tracing(self) -> IngressTracing | None:
        if self._settings.tracing.endpoint is None:
            return None
        from serve_app.tracing.ingress import IngressTracing
        from serve_app.tracing.serve import provider_of_replica

        return IngressTracing(provider_of_replica(self._settings.tracing, "t5-serve-api"))

    def _usage_writer(self) -> UsageWriter | None:
        settings = self._settings.usage
        if not settings.enabled:
            return None
        return UsageWriter(
            settings.folder or default_usage_folder(),
            max_bytes=settings.max_bytes,
            keep=settings.keep,
            queue_size=settings.queue_size,
            common={"replica": serve.get_replica_context().replica_id.unique_id},
            on_drop=self._telemetry.usage_dropped,
        )
