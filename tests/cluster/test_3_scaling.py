"""Load brings a worker pod, idleness takes it away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import httpx

from tests.cluster import kube
from tests.cluster.load import TEXT
from tests.cluster.release import GPU_NODE, Release

_CLIENTS = 12


def test_a_worker_pod_comes_and_goes(
    release: Release, token: str, figure: Callable[[str, str], None]
) -> None:
    assert len(kube.pods("summarizer")) == 1
    stop = threading.Event()
    statuses: list[int] = []

    def client() -> None:
        # Long texts keep the engine busy: each is some 60 parts.
        body = {"text": (TEXT + " ") * 250, "num_beams": 4, "timeout_s": 20}
        headers = {"Authorization": f"Bearer {token}"}
        while not stop.is_set():
            answer = httpx.post(
                f"{release.url}/v1/summarize", json=body, headers=headers, timeout=40
            )
            statuses.append(answer.status_code)

    threads = [threading.Thread(target=client) for _ in range(_CLIENTS)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        kube.until("a second worker pod", lambda: len(kube.pods("summarizer")) == 2, 180)
        pod_after = time.monotonic() - began
        kube.until("two replicas run", lambda: kube.running_replicas("Summarizer") == 2, 180)
        replica_after = time.monotonic() - began
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert statuses
    assert set(statuses) <= {200, 408, 503}, set(statuses)
    idle = time.monotonic()
    kube.until("one replica is left", lambda: kube.running_replicas("Summarizer") == 1, 180)
    kube.until("one worker pod is left", lambda: len(kube.pods("summarizer")) == 1, 180)
    figure("load to the second pod, to its replica", f"{pod_after:.0f} s, {replica_after:.0f} s")
    figure("idle until its pod is gone", f"{time.monotonic() - idle:.0f} s")
    assert {p["spec"]["nodeName"] for p in kube.pods("summarizer")} == {GPU_NODE}


def test_no_replica_has_logged_an_exception(token: str) -> None:
    # After load, deadlines and refusals; what their processes write stays in files of the pod.
    count = "cat /tmp/ray/session_latest/logs/worker-*.err | grep --count Traceback || true"
    told = {
        pod: kube.execute(pod, "bash", "-c", count, container="ray-worker").strip()
        for pod in kube.names(kube.pods("api")) | kube.names(kube.pods("summarizer"))
    }
    assert set(told.values()) == {"0"}, told
