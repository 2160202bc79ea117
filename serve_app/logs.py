"""Logging: one JSON object per line on stderr, each with the id of the request it is about."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

from serve_app.config import LogSettings

request_id_var: ContextVar[str] = ContextVar("request_id", default="")


class _RequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if request_id := request_id_var.get():
            record.request_id = request_id
        return True


def configure_logging(settings: LogSettings) -> None:
    """Send this package's log records to stderr as JSON lines. Safe to call twice."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RequestId())
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "severity", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
    )
    logger = logging.getLogger("serve_app")
    logger.handlers = [handler]
    logger.setLevel(settings.level)
    logger.propagate = False
