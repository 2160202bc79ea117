"""The usage event: what is recorded of a request, and its one schema.

An event is one JSON line. Its names are snake_case, because Cloud Logging's export to BigQuery
lower-cases them, and none ever changes its type, because that export then puts its rows aside.
Version 0 is the log line of earlier releases, without `schema_version`; `sql/events.sql` reads all
versions. Until version 1, calls that ended in an error had neither tokens nor times of the engine.
There is no field for text, for a token, or for anything else that a client made up, other than its
request id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

SCHEMA_VERSION = 2

# W3C Trace Context, section 3.2.2: version, trace id, parent id, flags.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}.*"
)

# What the application may tell of a request, beside what the middleware itself sees.
FACTS: dict[str, type] = {
    "client": str,
    "error_type": str,  # `kind` of a problem document
    "error_fields": list,  # names of fields of the API, no others
    "model": str,
    "model_revision": str,
    "num_beams": int,
    "max_new_tokens": int,
    "length_words": int,
    "length_sentences": int,
    "stream": bool,
    "on_overflow": str,
    "texts": int,
    "characters": int,
    "asked_tokens": int,  # of its texts as first split: what rate limits weigh
    "input_tokens": int,
    "output_tokens": int,
    "chunks": int,
    "truncated": int,  # texts of which a part was left out; a count since version 0
    "cached": int,  # texts answered without the model
    "queue_ms": float,
    "compute_ms": float,
    "estimated": bool,  # some of these are the Api's guess: an engine could not tell
}


def usage_event(
    *,
    request_id: str,
    traceparent: str,
    method: str,
    route: str,
    status: int,
    total_ms: float,
    request_bytes: int,
    response_bytes: int,
    facts: Mapping[str, Any],
    now: datetime | None = None,
) -> dict[str, Any]:
    """The event of one request, ready for JSON. What is not known is left out.

    `message` and `severity` are Cloud Logging's. `time` is when the answer ended, as in NGINX's
    access log.

    Raises:
        ValueError: a fact that the schema does not have, or not of its type.
    """
    for name, value in facts.items():
        if name not in FACTS or not isinstance(value, FACTS[name]):
            raise ValueError(f"not a fact of the usage schema: {name} ({type(value).__name__})")
    moment = (now or datetime.now(UTC)).isoformat(timespec="milliseconds")
    event = {
        "time": moment.replace("+00:00", "Z"),
        "severity": "INFO",
        "message": "request",
        "schema_version": SCHEMA_VERSION,
        "source": "service",
        "request_id": request_id,
        "trace_id": trace_id(traceparent),
        "method": method,
        "route": route,
        "status": status,
        "total_ms": round(total_ms, 2),
        "request_bytes": request_bytes,
        "response_bytes": response_bytes,
        **facts,
    }
    return {name: value for name, value in event.items() if value is not None}


def trace_id(traceparent: str) -> str | None:
    """The trace id of a W3C `traceparent` header; None where it is missing or ill-formed."""
    match = _TRACEPARENT.fullmatch(traceparent.strip())
    return match[1] if match else None
