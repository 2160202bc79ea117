"""The parts of the OpenAPI document that FastAPI cannot derive.

Bodies are read by our own code (two content types, exact errors), so their schemas are declared
here, from the same pydantic models that validate them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve_app.api.schemas import (
    TEXT_PATTERN,
    BatchRequest,
    Chunk,
    HfRequest,
    ModelRef,
    Problem,
    SummarizeRequest,
)
from serve_app.config import Limits

_REF = "#/components/schemas/{model}"
_EXAMPLE = {
    "text": "Ray is a framework for scaling Python applications. …",
    "length": {"words": 20},
}

_PROBLEMS = {
    400: "The body is not JSON, or not text",
    401: "No token, or an unknown, expired or revoked one",
    408: "The request's deadline passed",
    413: "The body is too large",
    415: "The content type or encoding is not understood",
    422: "A field breaks a rule or a limit, or replicas died on the text (type `poison`)",
    429: "Over a limit of the client, or the queue is full; see Retry-After",
    500: "An error inside the service",
    503: "Overloaded or unavailable; see Retry-After",
}


def _body(model: type[BaseModel], example: dict[str, Any], *, text: bool = False) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=model.__name__)}
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": example}}
    if text:
        content["text/plain"] = {"schema": {"type": "string", "pattern": TEXT_PATTERN}}
    return {"requestBody": {"required": True, "content": content}}


summarize_body = _body(SummarizeRequest, _EXAMPLE, text=True)
batch_body = _body(BatchRequest, {"texts": ["First text.", "Second text."]})
hf_body = _body(HfRequest, {"inputs": "A text."})


def describe(app: FastAPI, limits: Limits) -> None:
    """Complete the application's OpenAPI document: bodies, limits, problems, the event stream."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        document = generate()
        models: list[tuple[type[BaseModel], Any]] = [
            (model, "validation")
            for model in (SummarizeRequest, BatchRequest, HfRequest, Problem, ModelRef, Chunk)
        ]
        _, definitions = models_json_schema(models, ref_template=_REF)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions["$defs"])
        _add_limits(schemas, limits)
        for path, item in document["paths"].items():
            for operation in item.values():
                _add_problems(path, operation)
        stream = document["paths"]["/v1/summarize"]["post"]["responses"]["200"]["content"]
        stream["text/event-stream"] = {"itemSchema": _EVENTS}
        app.openapi_schema = document
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _event(name: str, description: str, data: dict[str, Any]) -> dict[str, Any]:
    content = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {
        "type": "object",
        "description": description,
        "required": ["event", "data"],
        "properties": {"event": {"const": name}, "data": content},
    }


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _ref(model: str) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model)}


_COUNT = {"type": "integer", "minimum": 1}
# `itemSchema` is of OpenAPI 3.2; older readers pass over it.
_EVENTS = {
    "oneOf": [
        _event(
            "start",
            "Work begins; the text goes through in `chunks` parts.",
            _object(id={"type": "string"}, model=_ref("ModelRef"), chunks=_COUNT),
        ),
        _event(
            "chunk",
            "A part of a long text is done.",
            {"allOf": [_ref("Chunk"), _object(chunks=_COUNT)]},
        ),
        _event(
            "delta",
            "More of the summary: all deltas concatenate to it.",
            _object(text={"type": "string"}),
        ),
        _event("done", "The whole answer.", _ref("SummarizeResponse")),
        _event("error", "It failed; nothing follows.", _ref("Problem")),
    ]
}


def _add_limits(schemas: dict[str, Any], limits: Limits) -> None:
    """State what this service allows: most of it is a setting."""
    most = {
        "num_beams": limits.num_beams,
        "max_new_tokens": limits.max_new_tokens,
        "min_new_tokens": limits.max_new_tokens,
        # They count the decoder's start token.
        "max_length": limits.max_new_tokens + 1,
        "min_length": limits.max_new_tokens + 1,
        "timeout_s": limits.timeout_s,
    }
    for model in ("SummarizeRequest", "BatchRequest", "HfGenerateParameters"):
        properties = schemas[model]["properties"]
        for name in most.keys() & properties.keys():
            number, _null = properties[name]["anyOf"]
            number["maximum"] = most[name]
    schemas["BatchRequest"]["properties"]["texts"]["maxItems"] = limits.batch_texts


_RATE_LIMIT = {
    "RateLimit-Policy": 'limits of this client: `"tokens";q=200000;w=120;qu="tokens"` is a bucket '
    'of 200,000 tokens that fills in 120 s; `"concurrency";q=4;qu="concurrent-requests"`',
    "RateLimit": 'what is left: `"tokens";r=150320;t=30`, and in how many seconds the bucket is '
    "full",
}
_RETRY_AFTER = {"Retry-After": "seconds until it is worth trying again"}


def _headers(described: dict[str, str]) -> dict[str, Any]:
    return {
        name: {"schema": {"type": "string"}, "description": f"{text}."}
        for name, text in described.items()
    }


def _add_problems(path: str, operation: dict[str, Any]) -> None:
    if path.startswith("/healthz"):
        return
    codes = (503,) if path == "/readyz" else tuple(_PROBLEMS)
    if "requestBody" not in operation and path != "/readyz":
        codes = (401, 500)
    for code in codes:
        schema = {"$ref": _REF.format(model="Problem")}
        operation["responses"][str(code)] = {
            "description": _PROBLEMS[code],
            "content": {"application/problem+json": {"schema": schema}},
        }
        if code in (429, 503):
            limits = _RATE_LIMIT if code == 429 else {}
            operation["responses"][str(code)]["headers"] = _headers(_RETRY_AFTER | limits)
    if 429 in codes:
        operation["responses"]["200"]["headers"] = _headers(_RATE_LIMIT)
