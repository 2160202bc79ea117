"""The service over HTTP on real Ray Serve."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from httpx_sse import connect_sse
from huggingface_hub import InferenceClient
from transformers import AutoTokenizer, T5ForConditionalGeneration

from serve_app.engine.checkpoint import Checkpoint
from serve_app.tokens import create, revoke
from tests.integration.conftest import Deploy, Service, until
from tests.texts import long_text, texts

TEXT = texts(1)[0]
# More than any machine decodes before a client of these tests has gone.
STEPS = 8_000
ENDLESS = {"text": TEXT, "min_new_tokens": STEPS, "max_new_tokens": STEPS}


@pytest.fixture(scope="module")
def endless(deploy: Deploy) -> Service:
    """Takes requests for so many tokens, one at a time."""
    return deploy("slow", "/slow", engine={"speculation": False}, limits={"max_new_tokens": STEPS})


def test_health_and_readiness_need_no_token(service: Service) -> None:
    assert httpx.get(f"{service.url}/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{service.url}/readyz", timeout=30)
    assert ready.status_code == 200
    assert ready.json()["step_age_s"] <= 30


def test_the_model_says_what_it_is(service: Service, checkpoint: Checkpoint) -> None:
    with service.client() as client:
        [model] = client.get(f"{service.url}/v1/models").json()["data"]
    assert model["id"] == "demo"
    assert model["revision"] == checkpoint.revision
    assert model["max_input_tokens_per_part"] == 512
    assert model["defaults"]["num_beams"] == 1


def test_a_summary_is_what_generate_gives_for_100_held_out_texts(
    service: Service, checkpoint: Checkpoint
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.path))
    model = T5ForConditionalGeneration.from_pretrained(
        str(checkpoint.path), dtype=torch.float32
    ).eval()
    documents = texts(100)
    with service.client() as client, ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(
                lambda text: client.post(f"{service.url}/v1/summarize", json={"text": text}),
                documents,
            )
        )
    for text, answer in zip(documents, answers, strict=True):
        assert answer.status_code == 200, answer.text
        ids = tokenizer("summarize: " + text, return_tensors="pt").input_ids
        with torch.inference_mode():
            # The model's own settings, said in generate()'s terms and with nobody's code.
            expected = model.generate(
                input_ids=ids,
                num_beams=1,
                do_sample=False,
                min_new_tokens=3,
                max_new_tokens=64,
                no_repeat_ngram_size=3,
            )[0]
        body = answer.json()
        assert body["summary"] == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert body["usage"]["input_tokens"] == ids.shape[1]
        content = [i for i in expected.tolist() if i not in (0, 1)]
        assert body["usage"]["output_tokens"] == len(content)
        assert body["truncated"] is False
        assert body["chunks"] == []


def test_64_clients_at_once_share_batches(service: Service) -> None:
    service.idle()
    cluster = service.cluster

    def counted(name: str, **labels: str) -> float:
        return cluster.series(name, deployment="Summarizer", application="main", **labels)

    def finished() -> float:
        return counted("ray_t5_engine_requests_total", outcome="finished")

    before = finished()
    read = counted("ray_t5_tokens_total", kind="input")
    written = counted("ray_t5_tokens_total", kind="output")
    batches = counted("ray_t5_batches_total")
    batched = counted("ray_t5_batched_requests_total")
    documents = texts(64)
    with service.client() as client, ThreadPoolExecutor(64) as pool:
        answers = list(
            pool.map(
                lambda text: client.post(
                    f"{service.url}/v1/summarize", json={"text": text, "max_new_tokens": 48}
                ),
                documents * 2,
            )
        )
    assert {answer.status_code for answer in answers} == {200}
    until(lambda: finished() == before + 128, "the metrics show all 128 requests")
    new_batches = counted("ray_t5_batches_total") - batches
    mean = (counted("ray_t5_batched_requests_total") - batched) / new_batches
    print(f"mean batch size: {mean:.1f}")
    assert mean > 8
    usages = [answer.json()["usage"] for answer in answers]
    assert counted("ray_t5_tokens_total", kind="input") - read == sum(
        usage["input_tokens"] for usage in usages
    )
    # The model also writes the end of a summary, where it comes to one.
    made = counted("ray_t5_tokens_total", kind="output") - written
    least = sum(usage["output_tokens"] for usage in usages)
    assert least < made <= least + len(usages)


def test_a_batch_keeps_its_order(service: Service) -> None:
    documents = texts(20)
    single = [service.post("/v1/summarize", {"text": text}).json()["summary"] for text in documents]
    answer = service.post("/v1/summarize/batch", {"texts": documents}).json()
    assert [item["result"]["summary"] for item in answer["results"]] == single
    assert len(set(single)) > 5


def test_a_stream_concatenates_to_the_summary(service: Service) -> None:
    expected = service.post("/v1/summarize", {"text": TEXT, "min_new_tokens": 16}).json()
    events = stream(service, {"text": TEXT, "min_new_tokens": 16, "stream": True})
    names = [name for name, _ in events]
    assert names[0] == "start"
    assert names[-1] == "done"
    deltas = [data["text"] for name, data in events if name == "delta"]
    assert len(deltas) > 3
    done = events[-1][1]
    assert "".join(deltas) == done["summary"] == expected["summary"]
    assert done["usage"]["output_tokens"] == expected["usage"]["output_tokens"]
    assert events[0][1]["id"] == done["id"]


def test_accept_asks_for_a_stream_too(service: Service) -> None:
    headers = {"Accept": "text/event-stream"}
    answer = service.post("/v1/summarize", {"text": TEXT}, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "event: done" in answer.text


def test_beams_stream_as_one_delta(service: Service) -> None:
    events = stream(service, {"text": TEXT, "num_beams": 3, "stream": True})
    assert [name for name, _ in events] == ["start", "delta", "done"]


def test_errors_found_before_the_stream_have_a_status(service: Service) -> None:
    answer = service.post("/v1/summarize", {"text": "", "stream": True})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_stops_the_engine(endless: Service, streaming: bool) -> None:
    endless.idle()
    before = endless.probe().load.steps
    body = {**ENDLESS, "stream": streaming}
    with endless.client() as client:
        if streaming:
            with connect_sse(client, "POST", f"{endless.url}/v1/summarize", json=body) as source:
                events = source.iter_sse()
                while next(events).event != "delta":
                    pass
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{endless.url}/v1/summarize", json=body, timeout=0.7)
    endless.idle()
    stopped = endless.probe().load.steps - before
    assert 0 < stopped < STEPS
    again = endless.probe().load.steps - before
    assert again == stopped


def test_a_deadline_is_kept(endless: Service) -> None:
    endless.idle()
    before = endless.probe().load.steps
    answer = endless.post("/v1/summarize", {**ENDLESS, "timeout_s": 0.5})
    assert answer.status_code == 408
    assert answer.json()["type"] == "urn:t5-serve:problem:deadline"
    endless.idle()
    assert endless.probe().load.steps - before < STEPS


def test_a_deadline_in_a_stream_is_an_error_event(endless: Service) -> None:
    events = stream(endless, {**ENDLESS, "timeout_s": 1.5, "stream": True})
    name, data = events[-1]
    assert name == "error"
    assert data["status"] == 408


def test_20_000_words_are_mapped_and_reduced(service: Service) -> None:
    document = long_text(20_000)
    answer = service.post("/v1/summarize", {"text": document, "timeout_s": 300})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["summary"]
    assert body["truncated"] is False
    chunks = body["chunks"]
    assert len(chunks) == body["usage"]["chunks"] > 20
    assert [chunk["index"] for chunk in chunks] == list(range(len(chunks)))
    # Nothing but white space lies between the parts, and every sentence is whole.
    end = 0
    for chunk in chunks:
        assert document[end : chunk["start"]].strip() == ""
        assert chunk["start"] < chunk["end"]
        end = chunk["end"]
    assert document[end:].strip() == ""
    assert body["usage"]["input_tokens"] > 20_000
    one = chunks[3]
    alone = service.post("/v1/summarize", {"text": document[one["start"] : one["end"]]}).json()
    assert alone["summary"] == one["summary"]


def test_a_long_stream_tells_its_progress(service: Service) -> None:
    events = stream(service, {"text": long_text(1_500), "stream": True})
    parts = [data for name, data in events if name == "chunk"]
    assert events[0][1]["chunks"] == len(parts) > 2
    assert sorted(part["index"] for part in parts) == list(range(len(parts)))


def test_overflow_can_be_truncated_and_says_so(service: Service) -> None:
    body = service.post(
        "/v1/summarize", {"text": long_text(1_500), "on_overflow": "truncate"}
    ).json()
    assert body["truncated"] is True
    assert body["usage"]["input_tokens"] == 512
    assert body["usage"]["chunks"] == 1


def test_plain_text_with_options_in_the_query(service: Service) -> None:
    expected = service.post("/v1/summarize", {"text": TEXT, "num_beams": 2, "max_new_tokens": 9})
    with service.client() as client:
        answer = client.post(
            f"{service.url}/v1/summarize",
            params={"num_beams": 2, "max_new_tokens": 9},
            content=TEXT.encode(),
            headers={"Content-Type": "text/plain; charset=utf-8"},
        )
    assert answer.json()["summary"] == expected.json()["summary"]
    assert answer.json()["usage"]["output_tokens"] <= 9


@pytest.mark.parametrize("words", [1, 3, 6])
def test_a_length_is_an_upper_bound(service: Service, words: int) -> None:
    for text in texts(6):
        body = service.post("/v1/summarize", {"text": text, "length": {"words": words}}).json()
        assert 1 <= len(body["summary"].split()) <= words


def test_the_hugging_face_client_works_unchanged(service: Service) -> None:
    client = InferenceClient(model=f"{service.url}/hf/summarization", token=service.token)
    expected = service.post("/v1/summarize", {"text": TEXT}).json()["summary"]
    assert client.summarization(TEXT).summary_text == expected
    asked = {"num_beams": 2, "max_length": 12}
    short = client.summarization(TEXT, generate_parameters=asked).summary_text
    body = {"text": TEXT, "num_beams": 2, "max_new_tokens": 11}
    assert short == service.post("/v1/summarize", body).json()["summary"]


def test_tokens_are_asked_for_and_revoked_while_running(service: Service) -> None:
    url = f"{service.url}/v1/summarize"
    for headers, challenge in (
        ({}, 'Bearer realm="t5-serve"'),
        ({"Authorization": "Bearer wrong"}, 'Bearer realm="t5-serve", error="invalid_token"'),
        ({"Authorization": "Basic abc"}, 'Bearer realm="t5-serve", error="invalid_token"'),
    ):
        answer = httpx.post(url, json={"text": TEXT}, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == challenge
        assert answer.json()["type"] == "urn:t5-serve:problem:unauthorized"

    _, token = create(service.tokens_file, "short-lived", None)
    headers = {"Authorization": f"Bearer {token}"}
    assert httpx.post(url, json={"text": TEXT}, headers=headers, timeout=60).status_code == 200
    assert revoke(service.tokens_file, "short-lived") == 1
    assert httpx.post(url, json={"text": TEXT}, headers=headers).status_code == 401
    assert service.post("/v1/summarize", {"text": TEXT}).status_code == 200


def test_a_10_mb_word_is_refused_by_size(service: Service) -> None:
    answer = service.post("/v1/summarize", {"text": "a" * 10_000_000})
    assert answer.status_code == 413
    assert answer.json()["errors"][0]["limit"] == 4 * 1024 * 1024


def test_a_word_of_a_whole_body_is_split_or_refused(service: Service) -> None:
    answer = service.post("/v1/summarize", {"text": "ab" * 30_000, "timeout_s": 300})
    assert answer.status_code == 200
    assert answer.json()["usage"]["chunks"] > 10


@pytest.mark.parametrize(
    ("content", "media_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe", "text/plain", 400),
        (b"{}", "application/xml", 415),
        (b"{}", "application/json", 422),
        (b'{"text": "a", "colour": 1}', "application/json", 422),
        (b'{"text": "a\\u0000b"}', "application/json", 422),
        (b'{"text": "a\\ud800b"}', "application/json", 422),
        (b'{"text": "a", "length_penalty": NaN}', "application/json", 400),
    ],
)
def test_bad_input_has_a_defined_answer(
    service: Service, content: bytes, media_type: str, status: int
) -> None:
    with service.client() as client:
        answer = client.post(
            f"{service.url}/v1/summarize", content=content, headers={"Content-Type": media_type}
        )
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_a_request_id_is_echoed_once(service: Service) -> None:
    headers = {"X-Request-Id": "my-id-1"}
    for body, status in (({"text": TEXT}, 200), ({"text": ""}, 422)):
        answer = service.post("/v1/summarize", body, headers=headers)
        assert answer.status_code == status
        assert answer.headers.get_list("x-request-id") == ["my-id-1"]
    made = service.post("/v1/summarize", {"text": TEXT}).headers.get_list("x-request-id")
    assert len(made) == 1
    assert len(made[0]) >= 16


def test_the_documentation_is_complete_and_local(service: Service) -> None:
    page = httpx.get(f"{service.url}/docs").text
    assert "https://" not in page
    document = httpx.get(f"{service.url}/openapi.json").json()
    assert set(document["paths"]["/v1/summarize"]["post"]["responses"]) >= {
        "200", "400", "401", "408", "413", "415", "422", "429", "503",
    }  # fmt: skip
    assert "/hf/summarization" in document["paths"]


def stream(service: Service, body: dict[str, Any]) -> list[tuple[str, Any]]:
    """All events of a streamed summary."""
    with (
        service.client() as client,
        connect_sse(client, "POST", f"{service.url}/v1/summarize", json=body) as source,
    ):
        return [(event.event, json.loads(event.data)) for event in source.iter_sse()]
