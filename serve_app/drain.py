"""Leave the Ray cluster in good order: what a worker pod runs before it is stopped.

Ray Serve starts replacements for the replicas of a draining node, lets these finish their
requests, and takes the node's proxy away when it has none left. Without this a pod that is evicted
takes its requests with it: Kubernetes knows of the pod, not of the replicas inside.
"""

from __future__ import annotations

import os
import sys
import time

import click
import psutil

# How Ray titles the processes that hold requests: replicas, and Serve's own proxy or HAProxy's.
_HOLDERS = ("ray::ServeReplica", "ray::ProxyActor", "ray::HAProxyManager")
_POLL_S = 0.5


@click.command()
@click.option("--timeout-s", type=click.IntRange(min=1), required=True, help="Wait at most this.")
def main(timeout_s: int) -> None:
    """Drain this node and wait until nothing on it holds requests any more."""
    deadline = time.monotonic() + timeout_s
    try:
        _drain(timeout_s)
    except Exception as error:  # a cluster without a head cannot take the replicas: then stop now
        sys.exit(f"drain: {error}")
    left = wait_until_idle(deadline)
    if left:
        sys.exit(f"drain: after {timeout_s} s still there: {', '.join(left)}")


def wait_until_idle(deadline: float) -> list[str]:
    """Wait until no process holds requests or `deadline` has come. Gives the titles left."""
    while (left := _holders()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return left


def _drain(timeout_s: int) -> None:
    # Ray has a command for it, `ray drain-node`, but hidden and unable to find its own node.
    from ray._private.services import find_node_ids
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

    nodes = find_node_ids()
    if len(nodes) != 1:
        raise RuntimeError(f"must find one raylet in this pod, found {len(nodes)}")
    accepted, reason = GcsClient(address=os.environ["RAY_ADDRESS"]).drain_node(
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
