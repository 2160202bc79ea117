"""What happens when the queue is full, a replica dies, or an ingress stands in front."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.conftest import Deploy, Service, until
from tests.texts import texts

TEXT = texts(1)[0]
SHORT = {"text": TEXT, "max_new_tokens": 8}
STEPS = 8_000


@pytest.mark.parametrize("status", [429, 503])
def test_a_full_queue_says_when_to_come_back(deploy: Deploy, status: int) -> None:
    service = deploy(
        f"tight-{status}",
        f"/tight-{status}",
        auth="off",
        engine={"max_waiting_requests": 2, "max_batch_size": 1, "speculation": False},
        limits={"full_status": status, "max_retry_after_s": 60, "max_new_tokens": STEPS},
    )
    stays = service.stays(6, at_most=STEPS)
    with ThreadPoolExecutor(8) as pool:
        running = pool.submit(service.post, "/v1/summarize", stays)
        until(lambda: service.probe().load.running_requests == 1, "one runs")
        waiting = [pool.submit(service.post, "/v1/summarize", stays) for _ in range(2)]
        until(lambda: service.probe().load.waiting_requests == 2, "two wait")

        load = service.probe().load
        refused = service.post("/v1/summarize", SHORT)
        assert refused.status_code == status
        assert refused.headers["content-type"] == "application/problem+json"
        document = refused.json()
        assert document["type"] == "urn:t5-serve:problem:overloaded"
        assert "2 requests" in document["detail"]
        seconds = int(refused.headers["retry-after"])
        assert 1 <= seconds <= 60
        # Computed: the tokens that wait over the measured rate, not a constant.
        assert load.drain_tokens_per_s is not None
        computed = load.waiting_tokens / load.drain_tokens_per_s
        assert seconds == pytest.approx(min(max(computed, 1), 60), abs=1)

        batch = service.post("/v1/summarize/batch", {"texts": [TEXT] * 3, "max_new_tokens": 8})
        assert batch.status_code == 200
        assert {item["error"]["status"] for item in batch.json()["results"]} == {status}

        streamed = service.post("/v1/summarize", {**SHORT, "stream": True})
        assert streamed.status_code == status
        assert "retry-after" in streamed.headers
        for future in (running, *waiting):
            assert future.result().status_code == 200
    assert service.post("/v1/summarize", SHORT).status_code == 200
    label = {"application": service.name, "outcome": "rejected"}
    until(
        lambda: service.cluster.series("ray_t5_engine_requests_total", **label) >= 5,
        "every refusal is counted",
    )


def test_requests_of_a_replica_killed_while_busy_are_answered_by_the_other(deploy: Deploy) -> None:
    service = deploy(
        "pair", "/pair", auth="off", replicas="2", engine={"speculation": False},
        limits={"max_new_tokens": STEPS},
    )  # fmt: skip
    body = service.stays(3, at_most=STEPS)  # they must be seen at work
    with ThreadPoolExecutor(16) as pool:
        requests: list[Future[httpx.Response]] = [
            pool.submit(service.post, "/v1/summarize", body) for _ in range(16)
        ]

        def busy() -> int | None:
            # Probes go where there is less to do: if that one works, both do.
            probe = service.probe()
            return probe.pid if probe.load.running_requests else None

        victim: int = until(busy, "both replicas work")
        os.kill(victim, signal.SIGKILL)
        answers = [future.result() for future in requests]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["summary"] for answer in answers}) == 1

    def replaced() -> bool:
        return victim not in {service.probe().pid for _ in range(8)}

    until(replaced, "the dead replica gets no requests")


def test_an_ingress_may_name_the_client(deploy: Deploy) -> None:
    service = deploy(
        "trusted", "/trusted", auth={"mode": "trusted-header", "header": "X-Api-Client"}
    )
    url = f"{service.url}/v1/summarize"

    def answer(headers: Any) -> httpx.Response:
        return httpx.post(url, json=SHORT, headers=headers, timeout=60)

    assert answer({"X-Api-Client": "team-a"}).status_code == 200
    for headers in (
        {},
        {"X-Api-Client": ""},
        {"X-Api-Client": "two words"},
        [("X-Api-Client", "a"), ("X-Api-Client", "b")],
        {"Authorization": f"Bearer {service.token}"},
    ):
        refused = answer(headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Bearer")


def test_unknown_settings_are_refused(deploy: Deploy) -> None:
    with pytest.raises(ValueError, match="colour"):
        deploy("unknown", "/unknown", api={"colour": "red"})


def test_no_service_knows_another_ones_tokens(deploy: Deploy, service: Service) -> None:
    other = deploy("other", "/other")
    assert other.token != service.token
    url = f"{other.url}/v1/models"
    assert httpx.get(url, headers=other.headers).status_code == 200
    assert httpx.get(url, headers=service.headers).status_code == 401
