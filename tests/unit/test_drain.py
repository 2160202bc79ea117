"""Waiting for what holds requests; the drain itself needs a cluster."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app import drain
from serve_app.drain import wait_until_idle


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    title = "ray::ServeReplica:draining:Summarizer"
    # Other tests' replicas are on this machine too.
    assert title.startswith(drain._HOLDERS)
    monkeypatch.setattr(drain, "_HOLDERS", (title,))
    process = subprocess.Popen(["bash", "-c", f"exec -a {title} sleep 60"])
    command = Path(f"/proc/{process.pid}/cmdline")
    while not command.read_bytes().startswith(title.encode()):  # until bash has become it
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
    assert wait_until_idle(head, began + 60) == []
    assert 0.5 < time.monotonic() - began < 60
    stopper.wait()


def test_it_names_what_is_left_at_the_deadline(replica: subprocess.Popen[bytes], head: str) -> None:
    assert wait_until_idle(head, time.monotonic() + 0.2) == [
        "ray::ServeReplica:draining:Summarizer 60"
    ]


def test_it_does_not_wait_for_a_head_that_is_gone(replica: subprocess.Popen[bytes]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    began = time.monotonic()
    assert wait_until_idle(address, began + 120, head_gone_s=1)
    assert 1 <= time.monotonic() - began < 60


def test_ray_has_what_draining_takes() -> None:
    # None of it is public: a new Ray may have moved it.
    from ray._private.services import find_node_ids
    from ray._raylet import InnerGcsClient  # what GcsClient passes calls on to
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    assert callable(find_node_ids)
    assert callable(InnerGcsClient.drain_node)
    assert DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION == 2
