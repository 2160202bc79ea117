"""Addresses of the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from tests.cluster.components import HOME

LINK = "t5c-host"  # the host's end of the pair that leads into the cluster
INNER_LINK = "t5c-inside"
OUTSIDE = "10.210.0.1"
INSIDE = "10.210.0.2"
LINK_NETWORK = "10.210.0.0/24"
API_PORT = 6443
SERVICES = "10.96.0.0/16"
BRIDGE = "t5c-bridge"
BRIDGE_NETWORK = "10.88.0.0/16"
DNS = "10.88.0.1"
REDIS = f"{DNS}:6379"


@dataclass(frozen=True)
class Node:
    """A kubelet with a containerd of its own; all in one network namespace, on one bridge."""

    name: str
    address: str
    port: int

    @property
    def socket(self) -> str:
        """containerd's, inside."""
        return f"/run/{self.name}/containerd.sock"

    @property
    def images(self) -> str:
        """containerd's root; outlives the cluster, so that images need not be imported again."""
        return str(HOME / "images" / self.name)

    @property
    def cgroup(self) -> str:
        """Parent of all its pods' control groups."""
        return f"t5c-{self.name}"


NODES = (Node("alpha", INSIDE, 10250), Node("beta", "10.210.0.3", 10251))
