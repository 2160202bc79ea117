"""Scaling by tokens on real Ray Serve: up with the work, however few requests, and down."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from ray import serve

from tests.integration.conftest import Deploy, Service, until
from tests.texts import texts

LONG = {"text": texts(1)[0], "min_new_tokens": 400, "max_new_tokens": 400}


def running(service: Service) -> int:
    deployment = serve.status().applications[service.name].deployments["Summarizer"]
    return deployment.replica_states.get("RUNNING", 0)


@pytest.mark.timeout(400)
def test_work_adds_replicas_and_idleness_takes_them_away(deploy: Deploy) -> None:
    service = deploy(
        "by-tokens",
        "/by-tokens",
        auth="off",
        engine={"max_batch_size": 2, "speculation": False},
        replicas={
            "max": 2,
            "signal": "tokens",
            "target_drain_s": 1,
            "target_ongoing_requests": 1_000,  # by their number one replica would do
            "upscale_delay_s": 0,
            "downscale_delay_s": 3,
            "look_back_period_s": 10.5,
        },
    )
    enough = Event()

    def ask() -> None:
        while not enough.is_set():
            assert service.post("/v1/summarize", LONG).status_code == 200

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask) for _ in range(6)]
        try:
            until(lambda: running(service) == 2, "there is a second replica", 150)
        finally:
            enough.set()
        for one in asking:
            one.result()
    until(lambda: running(service) == 1, "it has gone again", 150)
