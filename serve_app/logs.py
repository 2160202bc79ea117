"""Logging: one JSON object per line on stderr, each with the id of the request it is about."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

from serve_app.config import LogSettings

request_id_var: ContextVar[str] = ContextVar("request_id", default="")
trace_id_var: ContextVar[str] = ContextVar("trace_id", default="")


class _RequestIds(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        for name, var in (("request_id", request_id_var), ("trace_id", trace_id_var)):
            if (value := var.get()) and not hasattr(record, name):
                setattr(record, name, value)
        return True


def configure_logging(settings: LogSettings) -> None:
    """Send this package's log records to stderr as JSON lines. Safe to call twice."""
    # Not `sys.stderr`: with RAY_SERVE_LOG_TO_STDERR=0 Serve puts its own log in that one's place,
    # and wraps each line as the message of another, at INFO.
    handler = logging.StreamHandler(sys.__stderr__)
    handler.addFilter(_RequestIds())
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "severity", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
    )
    # opentelemetry's: what became of the spans.
    for name, level in (("serve_app", settings.level), ("opentelemetry", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
