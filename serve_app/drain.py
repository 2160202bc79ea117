"""Leave the Ray cluster in good order: what a worker pod runs before it is stopped.

Ray Serve starts replacements for the replicas of a draining node, lets these finish their
requests, and takes the node's proxy away when it has none left. Without this a pod that is evicted
takes its requests with it: Kubernetes knows of the pod, not of the replicas inside.
"""

from __future__ import annotations

import os
import socket
import sys
import time

import click
import psutil

# How Ray titles the processes that hold requests: replicas, and Serve's own proxy or HAProxy's.
_HOLDERS = ("ray::ServeReplica", "ray::ProxyActor", "ray::HAProxyManager")
_POLL_S = 0.5
# With the head gone nothing moves replicas any more: the whole cluster is being deleted, or a new
# head comes later than a pod that has to go can wait for.
_HEAD_GONE_S = 30.0


@click.command()
@click.option("--timeout-s", type=click.IntRange(min=1), required=True, help="Wait at most this.")
def main(timeout_s: int) -> None:
    """Drain this node and wait until nothing on it holds requests any more."""
    address, deadline = os.environ["RAY_ADDRESS"], time.monotonic() + timeout_s
    try:
        _drain(address, timeout_s)
    except Exception as error:  # a cluster without a head cannot take the replicas: then stop now
        sys.exit(f"drain: {error}")
    left = wait_until_idle(address, deadline)
    if left:
        sys.exit(f"drain: still there: {', '.join(left)}")


def wait_until_idle(address: str, deadline: float, head_gone_s: float = _HEAD_GONE_S) -> list[str]:
    """Wait until no process here holds requests. Gives the titles of those left.

    Args:
        address: host and port of the head.
        deadline: monotonic time at which to stop waiting.
        head_gone_s: stop, too, when the head has not answered for this long.
    """
    head_seen = time.monotonic()
    while left := _holders():
        now = time.monotonic()
        if _answers(address):
            head_seen = now
        if now >= deadline or now - head_seen >= head_gone_s:
            break
        time.sleep(_POLL_S)
    return left


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _drain(address: str, timeout_s: int) -> None:
    # Ray has a command for it, `ray drain-node`, but hidden and unable to find its own node.
    from ray._private.services import find_node_ids
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

    nodes = find_node_ids()
    if not nodes:  # the autoscaler drained it, and only then has the pod deleted
        return
    if len(nodes) > 1:
        raise RuntimeError(f"must find one raylet in this pod, found {len(nodes)}")
    accepted, reason = GcsClient(address=address).drain_node(
        nodes.pop(),
        DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "the pod is being stopped",
        time.time_ns() // 1_000_000 + timeout_s * 1000,
    )
    if not accepted:
        raise RuntimeError(f"refused: {reason}")


def _holders() -> list[str]:
    titles = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith(_HOLDERS):
            titles.append(title)
    return sorted(titles)


if __name__ == "__main__":
    main()
