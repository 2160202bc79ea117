"""The HTTP application and the service behind it, over an engine in this process."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.protocol import GenerationSettings
from tests.texts import long_text, texts
from tests.unit.conftest import Clients, Direct
from tests.unit.local import Local, local_app

pytestmark = pytest.mark.anyio
TEXT = texts(1)[0]


@pytest.fixture
async def app(checkpoint: Checkpoint, clients: Clients) -> AsyncIterator[Local]:
    async with local_app(checkpoint, clients(), max_input_tokens=96) as local:
        yield local


async def summarize(app: Local, text: str, **options: Any) -> dict[str, Any]:
    answer = await app.http.post("/v1/summarize", json={"text": text, **options})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"num_beams": 4, "min_new_tokens": 5, "length_penalty": 0.5, "early_stopping": False},
            GenerationSettings(4, 5, 64, 0.5, 3, False),
        ),
        ({"length": {"words": 10}}, GenerationSettings(1, 3, 36, 1.0, 3, True)),
        ({"length": {"words": 1}}, GenerationSettings(1, 1, 18, 1.0, 3, True)),
        ({"max_new_tokens": 2}, GenerationSettings(1, 2, 2, 1.0, 3, True)),
        (
            {"length": {"sentences": 1}, "no_repeat_ngram_size": 0},
            GenerationSettings(1, 3, 64, 1.0, 0, True),
        ),
    ],
)
async def test_what_is_not_said_follows_the_model(
    app: Local, options: dict[str, Any], expected: GenerationSettings
) -> None:
    await summarize(app, "A short text about a program that draws maps.", **options)
    assert app.backend.calls[-1].settings == expected


async def test_the_input_is_prefix_text_and_end_token(app: Local, direct: Direct) -> None:
    await summarize(app, "A program that draws maps.")
    assert list(app.backend.calls[-1].input_ids) == direct.ids("A program that draws maps.")


async def test_a_text_of_exactly_one_part_is_not_split(app: Local, direct: Direct) -> None:
    words = "map"
    while len(direct.ids(words + " map")) <= 96:
        words += " map"
    assert (await summarize(app, words))["chunks"] == []
    assert len(app.backend.calls[-1].input_ids) == 96
    assert len((await summarize(app, words + " map"))["chunks"]) == 2


async def test_map_and_reduce(app: Local, direct: Direct) -> None:
    text = long_text(400)
    body = await summarize(app, text)
    chunks = body["chunks"]
    assert len(chunks) > 5
    # Every part went through the model as itself ...
    inputs = [list(call.input_ids) for call in app.backend.calls]
    for chunk, ids in zip(chunks, inputs, strict=False):
        assert ids == direct.ids(text[chunk["start"] : chunk["end"]])
        assert len(ids) <= 96
        told = direct.generate(ids, min_new_tokens=3, max_new_tokens=42, no_repeat_ngram_size=3)
        assert direct.tokenizer.decode(told, skip_special_tokens=True).strip() == chunk["summary"]
    # ... and the last pass saw nothing but summaries.
    last = direct.tokenizer.decode(inputs[-1], skip_special_tokens=True)
    assert last.startswith("summarize: ")
    assert body["usage"]["input_tokens"] == sum(map(len, inputs))
    assert app.telemetry.summaries == [(False, len(chunks))]


async def test_reducing_recurses_until_it_fits(app: Local) -> None:
    body = await summarize(app, long_text(4_000))
    calls = len(app.backend.calls)
    assert calls > len(body["chunks"]) + 1  # more than one level
    assert all(len(call.input_ids) <= 96 for call in app.backend.calls)
    assert body["truncated"] is False


async def test_no_truncation_is_silent(checkpoint: Checkpoint, clients: Clients) -> None:
    limits = {"reduce_rounds": 1}
    async with local_app(checkpoint, clients(), limits=limits, max_input_tokens=64) as app:
        body = await summarize(app, long_text(4_000))
        assert body["truncated"] is True
        assert app.telemetry.summaries[0][0] is True


async def test_a_batch_shares_one_set_of_options(app: Local) -> None:
    answer = await app.http.post(
        "/v1/summarize/batch", json={"texts": texts(5), "num_beams": 2, "max_new_tokens": 10}
    )
    results = answer.json()["results"]
    assert [item["index"] for item in results] == [0, 1, 2, 3, 4]
    assert {call.settings.num_beams for call in app.backend.calls} == {2}
    whole = [item["result"] for item in results if not item["result"]["chunks"]]
    assert whole
    assert all(result["usage"]["output_tokens"] <= 10 for result in whole)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (None, GenerationSettings(1, 3, 64, 1.0, 3, True)),
        (
            {"generate_parameters": {"num_beams": 3, "min_length": 6, "max_length": 21}},
            GenerationSettings(3, 5, 20, 1.0, 3, True),
        ),
        (
            {"generate_parameters": {"max_new_tokens": 9}, "clean_up_tokenization_spaces": True},
            GenerationSettings(1, 3, 9, 1.0, 3, True),
        ),
    ],
)
async def test_the_hugging_face_task_counts_the_start_token(
    app: Local, parameters: dict[str, Any] | None, expected: GenerationSettings
) -> None:
    body = {"inputs": "A program that draws maps."}
    answer = await app.http.post(
        "/hf/summarization", json={**body, **({"parameters": parameters} if parameters else {})}
    )
    assert answer.status_code == 200
    assert [set(item) for item in answer.json()] == [{"summary_text"}]
    assert app.backend.calls[-1].settings == expected


async def test_the_hugging_face_task_truncates_when_told(app: Local) -> None:
    body = {"inputs": long_text(300), "parameters": {"truncation": "longest_first"}}
    assert (await app.http.post("/hf/summarization", json=body)).status_code == 200
    assert len(app.backend.calls) == 1
    body["parameters"] = {"truncation": "do_not_truncate"}
    assert (await app.http.post("/hf/summarization", json=body)).status_code == 422


async def test_one_log_line_per_request_without_its_text(
    app: Local, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "Quixotic zebras draw maps of the harbour."
    logging.getLogger("serve_app").propagate = True
    with caplog.at_level(logging.INFO, logger="serve_app"):
        await app.http.post(
            "/v1/summarize", json={"text": secret}, headers={"X-Request-Id": "log-1"}
        )
        await app.http.post("/v1/summarize", json={"text": ""})
    good, bad = [vars(record) for record in caplog.records if record.message == "request"]
    assert (good["status"], good["route"], good["client"]) == (200, "/v1/summarize", "tester")
    assert good["characters"] == len(secret)
    assert good["output_tokens"] > 0
    assert (bad["status"], bad["error_type"], bad["error_fields"]) == (422, "invalid", ["text"])
    assert "Quixotic" not in caplog.text
    assert app.telemetry.requests == [("/v1/summarize", 200), ("/v1/summarize", 422)]


async def test_events_of_a_stream(app: Local) -> None:
    answer = await app.http.post("/v1/summarize", json={"text": TEXT, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    blocks = [block for block in answer.text.split("\n\n") if block]
    names = [block.split("\n")[0].removeprefix("event: ") for block in blocks]
    assert names[0] == "start"
    assert names[-1] == "done"
    done = json.loads(blocks[-1].split("\n")[1].removeprefix("data: "))
    assert done["summary"] == (await summarize(app, TEXT))["summary"]


async def test_pages_carry_a_strict_policy(app: Local) -> None:
    for path, inline in (("/", False), ("/docs", True), ("/healthz", False)):
        answer = await app.http.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert ("unsafe-inline" in policy) is inline
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_the_openapi_document_describes_bodies_and_problems(app: Local) -> None:
    document = (await app.http.get("/openapi.json")).json()
    operation = document["paths"]["/v1/summarize"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "text/plain"}
    assert "text/event-stream" in operation["responses"]["200"]["content"]
    request = document["components"]["schemas"]["SummarizeRequest"]
    assert set(request["properties"]) == {
        "text", "num_beams", "min_new_tokens", "max_new_tokens", "length_penalty",
        "no_repeat_ngram_size", "early_stopping", "length", "on_overflow", "stream", "timeout_s",
    }  # fmt: skip
    # Limits are those of this service.
    number, null = request["properties"]["num_beams"]["anyOf"]
    assert (number, null) == ({"type": "integer", "minimum": 1, "maximum": 8}, {"type": "null"})
    hf = document["components"]["schemas"]["HfGenerateParameters"]["properties"]
    assert hf["max_length"]["anyOf"][0]["maximum"] == 512 + 1
    assert (
        document["components"]["schemas"]["BatchRequest"]["properties"]["texts"]["maxItems"] == 64
    )
    # Exactly what the service takes for a text, by this language's idea of white space.
    pattern = re.compile(request["properties"]["text"]["pattern"])
    assert operation["requestBody"]["content"]["text/plain"]["schema"]["pattern"] == pattern.pattern
    for code in range(sys.maxunicode + 1):
        blank = chr(code).isspace() or code == 0
        assert (pattern.search(chr(code)) is None) is blank, hex(code)
    assert pattern.search(" \n a\n")
    assert not pattern.search("a\0")
    events = operation["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]["oneOf"]
    named = [event["properties"]["event"]["const"] for event in events]
    assert named == ["start", "chunk", "delta", "done", "error"]
    references = {
        part for part in json.dumps(document).split('"') if part.startswith("#/components/schemas/")
    }
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references <= known
