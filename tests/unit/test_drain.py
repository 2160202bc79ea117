"""Waiting for what holds requests; the drain itself needs a cluster."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from serve_app.drain import wait_until_idle


@pytest.fixture
def replica() -> Iterator[subprocess.Popen[bytes]]:
    title = "ray::ServeReplica:t5-serve:Summarizer"
    process = subprocess.Popen(["bash", "-c", f"exec -a {title} sleep 60"])
    for _ in range(100):
        if title in subprocess.check_output(["ps", "-o", "args=", "-p", str(process.pid)]).decode():
            break
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def head() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_it_returns_once_the_replicas_are_gone(replica: subprocess.Popen[bytes], head: str) -> None:
    stopper = subprocess.Popen(["bash", "-c", f"sleep 1; kill {replica.pid}"])
    began = time.monotonic()
    assert wait_until_idle(head, time.monotonic() + 30) == []
    assert 0.5 < time.monotonic() - began < 20
    stopper.wait()


def test_it_names_what_is_left_at_the_deadline(replica: subprocess.Popen[bytes], head: str) -> None:
    assert wait_until_idle(head, time.monotonic() + 0.2) == [
        "ray::ServeReplica:t5-serve:Summarizer 60"
    ]


def test_it_does_not_wait_for_a_head_that_is_gone(replica: subprocess.Popen[bytes]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    began = time.monotonic()
    assert wait_until_idle(address, began + 60, head_gone_s=1)
    assert 1 <= time.monotonic() - began < 20
