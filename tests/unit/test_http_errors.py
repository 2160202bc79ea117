"""Bad input: every answer names the field, the limit and the value."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve_app.engine.checkpoint import Checkpoint
from tests.unit.conftest import Clients
from tests.unit.local import Local, local_app

pytestmark = pytest.mark.anyio

TEXT = "A small program that shows the weather. It asks a server every hour."


@pytest.fixture
async def app(checkpoint: Checkpoint, clients: Clients) -> AsyncIterator[Local]:
    limits = {"body_bytes": 20_000, "input_tokens": 2_000, "batch_texts": 3, "max_new_tokens": 100}
    async with local_app(checkpoint, clients(), limits=limits) as local:
        yield local


async def problem(response: Any, status: int, kind: str) -> dict[str, Any]:
    """Check that a response is a problem document of this kind; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["status"] == status
    assert document["type"] == f"urn:t5-serve:problem:{kind}"
    assert document["title"]
    assert document["detail"]
    assert document["request_id"] == response.headers["x-request-id"]
    return document


@pytest.mark.parametrize(
    ("body", "field", "limit", "value"),
    [
        ({}, "text", None, None),
        ({"text": ""}, "text", 1, ""),
        ({"text": " \n\t "}, "text", 1, " \n\t "),
        ({"text": 7}, "text", None, 7),
        ({"text": None}, "text", None, None),
        ({"text": "a\0b"}, "text", None, "\0b"),
        ({"text": TEXT, "num_beams": 0}, "num_beams", 1, 0),
        ({"text": TEXT, "num_beams": 9}, "num_beams", 8, 9),
        ({"text": TEXT, "num_beams": 2.5}, "num_beams", None, 2.5),
        ({"text": TEXT, "num_beams": True}, "num_beams", None, True),
        ({"text": TEXT, "num_beams": "4"}, "num_beams", None, "4"),
        ({"text": TEXT, "max_new_tokens": 101}, "max_new_tokens", 100, 101),
        ({"text": TEXT, "max_new_tokens": 0}, "max_new_tokens", 1, 0),
        ({"text": TEXT, "min_new_tokens": -1}, "min_new_tokens", 0, -1),
        (
            {"text": TEXT, "min_new_tokens": 50, "max_new_tokens": 20},
            "min_new_tokens",
            20,
            50,
        ),
        ({"text": TEXT, "length_penalty": 11}, "length_penalty", 10, 11),
        ({"text": TEXT, "no_repeat_ngram_size": 101}, "no_repeat_ngram_size", 100, 101),
        ({"text": TEXT, "early_stopping": "yes"}, "early_stopping", None, "yes"),
        ({"text": TEXT, "timeout_s": 0}, "timeout_s", 0, 0),
        ({"text": TEXT, "timeout_s": 301}, "timeout_s", 300, 301),
        (
            {"text": TEXT, "on_overflow": "drop"},
            "on_overflow",
            "'error', 'truncate' or 'map_reduce'",
            "drop",
        ),
        ({"text": TEXT, "length": {"words": 0}}, "length.words", 1, 0),
        ({"text": TEXT, "length": {"pages": 2}}, "length.pages", None, 2),
        ({"text": TEXT, "temperature": 0.7}, "temperature", None, 0.7),
    ],
)
async def test_a_bad_field_is_named_with_limit_and_value(
    app: Local, body: dict[str, Any], field: str, limit: Any, value: Any
) -> None:
    document = await problem(await app.http.post("/v1/summarize", json=body), 422, "invalid")
    [error] = document["errors"]
    assert error["field"] == field
    assert error.get("limit", limit) == limit
    if limit is not None:
        assert error["limit"] == limit
    assert error.get("value") == value
    assert error["message"] in document["detail"]


@pytest.mark.parametrize("length", [{}, {"words": 5, "sentences": 1}])
async def test_length_is_words_or_sentences(app: Local, length: dict[str, int]) -> None:
    response = await app.http.post("/v1/summarize", json={"text": TEXT, "length": length})
    document = await problem(response, 422, "invalid")
    assert document["errors"][0]["field"] == "length"


async def test_a_whole_number_may_be_written_with_a_point(app: Local) -> None:
    body = {"text": TEXT, "num_beams": 2.0, "max_new_tokens": 5.0, "length": {"words": 3.0}}
    assert (await app.http.post("/v1/summarize", json=body)).status_code == 200
    assert app.backend.calls[-1].settings.num_beams == 2
    assert app.backend.calls[-1].settings.max_new_tokens == 5


async def test_all_bad_fields_are_told_at_once(app: Local) -> None:
    body = {"text": TEXT, "num_beams": 0, "timeout_s": -1, "colour": "red"}
    document = await problem(await app.http.post("/v1/summarize", json=body), 422, "invalid")
    assert {error["field"] for error in document["errors"]} == {"num_beams", "timeout_s", "colour"}


async def test_a_lone_surrogate_is_not_text(app: Local) -> None:
    # json.dumps escapes it, so it arrives as valid ASCII.
    response = await post_raw(app, json.dumps({"text": "bad \ud800 text"}))
    document = await problem(response, 422, "invalid")
    [error] = document["errors"]
    assert error["field"] == "text"
    assert "surrogate" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        '{"text": "a"',
        '{"text": NaN}',
        '{"text": "a", "length_penalty": Infinity}',
        b"\xff",
    ],
)
async def test_what_is_not_json_is_refused(app: Local, body: str | bytes) -> None:
    document = await problem(await post_raw(app, body), 400, "bad-request")
    assert "not JSON" in document["detail"]


@pytest.mark.parametrize("body", ["[]", '"text"', "null", "3"])
async def test_a_body_that_is_no_object_is_refused(app: Local, body: str) -> None:
    document = await problem(await post_raw(app, body), 422, "invalid")
    assert document["errors"][0]["field"] == "body"


async def test_huge_numbers_do_not_break_the_answer(app: Local) -> None:
    digits = "9" * 5_000
    for body in (f'{{"text": "a", "num_beams": {digits}}}', '{"text": "a", "num_beams": 1e400}'):
        response = await post_raw(app, body)
        assert response.status_code in (400, 422)
        assert len(response.content) < 2_000


async def test_a_body_over_the_limit_is_refused(app: Local) -> None:
    response = await app.http.post("/v1/summarize", json={"text": "a " * 15_000})
    document = await problem(response, 413, "body-too-large")
    [error] = document["errors"]
    assert error["field"] == "body"
    assert error["limit"] == 20_000
    assert error["value"] > 30_000


async def test_a_body_without_a_length_is_stopped_at_the_limit(app: Local) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"a" * 1_000

    response = await app.http.post(
        "/v1/summarize", content=pieces(), headers={"Content-Type": "text/plain"}
    )
    await problem(response, 413, "body-too-large")


async def test_a_body_that_stops_arriving_is_not_waited_for_beyond_any_deadline(
    checkpoint: Checkpoint, clients: Clients
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"a" * 1_000
        await asyncio.Event().wait()

    async with local_app(checkpoint, clients(), limits={"timeout_s": 0.2}) as app:
        response = await app.http.post(
            "/v1/summarize", content=pieces(), headers={"Content-Type": "text/plain"}
        )
    document = await problem(response, 408, "deadline")
    assert document["detail"] == "body: must arrive within 0.2 s, 1000 bytes have"


@pytest.mark.parametrize("media_type", ["", "text/html", "application/xml", "multipart/form-data"])
async def test_other_media_types_are_refused(app: Local, media_type: str) -> None:
    response = await app.http.post(
        "/v1/summarize", content=b"{}", headers={"Content-Type": media_type}
    )
    document = await problem(response, 415, "unsupported-media-type")
    assert document["errors"][0]["field"] == "Content-Type"


async def test_compressed_bodies_are_refused_by_name(app: Local) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = await app.http.post("/v1/summarize", content=b"\x1f\x8b", headers=headers)
    document = await problem(response, 415, "unsupported-media-type")
    assert document["errors"][0] == {
        "field": "Content-Encoding",
        "message": "must be identity",
        "limit": "identity",
        "value": "gzip",
    }


async def test_too_many_tokens_are_refused_with_their_count(app: Local) -> None:
    document = await problem(
        await app.http.post("/v1/summarize", json={"text": "weather report " * 1_200}),
        422,
        "invalid",
    )
    [error] = document["errors"]
    assert (error["field"], error["limit"]) == ("text", 2_000)
    assert error["value"] > 2_000


async def test_overflow_can_be_an_error(app: Local) -> None:
    body = {"text": "weather report " * 400, "on_overflow": "error"}
    document = await problem(await app.http.post("/v1/summarize", json=body), 422, "invalid")
    [error] = document["errors"]
    assert error["field"] == "text"
    assert error["limit"] < 512 < error["value"]


async def test_unknown_paths_and_methods(app: Local) -> None:
    await problem(await app.http.get("/v2/summarize"), 404, "not-found")
    response = await app.http.get("/v1/summarize")
    await problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"


async def test_a_batch_has_a_limit(app: Local) -> None:
    response = await app.http.post("/v1/summarize/batch", json={"texts": [TEXT] * 4})
    document = await problem(response, 422, "invalid")
    assert document["errors"] == [
        {"field": "texts", "message": "must have at most 3 texts, has 4", "limit": 3, "value": 4}
    ]
    response = await app.http.post("/v1/summarize/batch", json={"texts": []})
    assert (await problem(response, 422, "invalid"))["errors"][0]["field"] == "texts"
    for stream in (True, 0, None):
        body = {"texts": [TEXT], "stream": stream}
        response = await app.http.post("/v1/summarize/batch", json=body)
        assert (await problem(response, 422, "invalid"))["errors"][0]["field"] == "stream"


async def test_one_bad_text_of_a_batch_is_its_own_error(app: Local) -> None:
    response = await app.http.post("/v1/summarize/batch", json={"texts": [TEXT, " ", TEXT]})
    assert response.status_code == 200
    good, bad, also_good = response.json()["results"]
    assert good["result"]["summary"] == also_good["result"]["summary"]
    assert [item["index"] for item in (good, bad, also_good)] == [0, 1, 2]
    assert "result" not in bad
    assert bad["error"]["status"] == 422
    assert bad["error"]["errors"][0]["field"] == "texts.1"


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"truncation": "sometimes"}, "parameters.truncation"),
        ({"top_k": 3}, "parameters.top_k"),
        ({"generate_parameters": {"max_length": 1}}, "parameters.generate_parameters.max_length"),
        ({"generate_parameters": {"num_beams": 99}}, "num_beams"),
    ],
)
async def test_the_hugging_face_task_checks_too(
    app: Local, parameters: dict[str, Any], field: str
) -> None:
    body = {"inputs": TEXT, "parameters": parameters}
    document = await problem(await app.http.post("/hf/summarization", json=body), 422, "invalid")
    assert document["errors"][0]["field"] == field


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2_3:4", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("ä", False)],
)
async def test_a_request_id_is_kept_when_well_formed(app: Local, given: str, kept: bool) -> None:
    headers = {"X-Request-Id": given.encode("latin-1")}
    response = await app.http.post("/v1/summarize", json={"text": ""}, headers=headers)
    document = await problem(response, 422, "invalid")
    assert (document["request_id"] == given) is kept


async def post_raw(app: Local, body: str | bytes) -> Any:
    headers = {"Content-Type": "application/json"}
    return await app.http.post("/v1/summarize", content=body, headers=headers)
