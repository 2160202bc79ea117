"""The Api deployment: the HTTP application inside a Ray Serve replica."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.api.app import create_app
from serve_app.api.auth import authenticator
from serve_app.api.backend import RayBackend
from serve_app.api.service import SummaryService
from serve_app.api.telemetry import ServeTelemetry
from serve_app.config import ServiceSettings
from serve_app.engine.checkpoint import resolve
from serve_app.logs import configure_logging


@serve.ingress()
class Api:
    """CPU ingress: takes HTTP, asks the Summarizer through its handle."""

    async def __init__(  # type: ignore[misc]  # Serve awaits an async constructor
        self, settings: dict[str, Any], summarizer: DeploymentHandle[Any]
    ) -> None:
        self._settings = ServiceSettings.model_validate(settings)
        configure_logging(self._settings.log)
        model = self._settings.model
        checkpoint = await asyncio.to_thread(resolve, model.name, model.revision)
        self._service = SummaryService(
            checkpoint,
            RayBackend(summarizer, self._settings.limits),
            self._settings.limits,
            self._settings.api,
            model.max_input_tokens,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica has been constructed."""
        return create_app(
            self._service,
            authenticator(self._settings.auth),
            ServeTelemetry(),
            self._settings.api,
            echo_request_id=False,
        )
