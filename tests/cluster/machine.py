"""Start and stop the cluster: namespaces of its own, and a link into them from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster import components, daemons
from tests.cluster.components import ROOT
from tests.cluster.network import (
    BRIDGE_NETWORK,
    INNER_LINK,
    INSIDE,
    LINK,
    NODES,
    OUTSIDE,
    SERVICES,
    Node,
)
from tests.cluster.say import say

_RUNNING = daemons.RUN / "process.json"
_CGROUPS = Path("/sys/fs/cgroup")


def running() -> int | None:
    """The cluster's process 1, as seen from outside; none if it does not run."""
    try:
        saved = json.loads(_RUNNING.read_text())
    except FileNotFoundError:
        return None
    # An id may have been given to another process since.
    return saved["id"] if _started(saved["id"]) == saved["started"] else None


def _started(process: int) -> str | None:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def up() -> None:
    """Build what is missing, then start all; nothing to do if it runs."""
    if running():
        return
    components.build()
    down()
    daemons.LOGS.mkdir(parents=True)
    _make_cgroups()
    say("starting the cluster …")
    with open(daemons.LOGS / "cluster.log", "wb") as log:
        outer = subprocess.Popen(
            [
                "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
                sys.executable, "-m", "tests.cluster.daemons",
            ],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    while not children.read_text().split():
        time.sleep(0.05)
    inner = int(children.read_text().split()[0])
    _RUNNING.write_text(json.dumps({"id": inner, "started": _started(inner)}))
    _link(inner)
    while not daemons.READY.exists():
        if outer.poll() is not None:
            sys.exit((daemons.LOGS / "cluster.log").read_text(errors="replace"))
        time.sleep(0.2)
    say("the cluster runs: all nodes are Ready")


def down() -> None:
    """Stop all, and remove what outlives the namespaces."""
    if inner := running():
        os.kill(inner, signal.SIGTERM)
        while _started(inner) is not None:
            time.sleep(0.1)
        say("the cluster is stopped")
    for controller in _CGROUPS.iterdir():
        for node in NODES:
            _remove_cgroup(controller / node.cgroup)
    shutil.rmtree(daemons.RUN, ignore_errors=True)


def inside(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the cluster's namespaces."""
    enter = ["nsenter", f"--target={running()}", "--mount", "--net", "--pid"]
    return subprocess.run([*enter, *map(str, command)], check=check, capture_output=True, text=True)


def load(layout: Path) -> None:
    """Give the images of an OCI layout, or of an archive of one, to all nodes."""
    if layout.is_dir():
        command = f"tar -C {layout} -cf - blobs index.json oci-layout"
    else:
        command = f"cat {layout}"
    enter = f"nsenter --target={running()} --mount --net --pid"
    for node in NODES:
        _share_blobs(NODES[0], node)
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c",
             f"{command} | {enter} {' '.join(_images(node))} import -"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"cannot load {layout}: {done.stdout}")


def _share_blobs(one: Node, other: Node) -> None:
    """Hard links in place of copies: containerd keeps a blob that is there under its digest."""
    folder = "io.containerd.content.v1.content/blobs/sha256"
    if one is other:
        return
    for blob in Path(one.images, folder).iterdir():
        link = Path(other.images, folder, blob.name)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.hardlink_to(blob)


def has_image(name: str) -> bool:
    """Whether all nodes have it."""
    return all(name in _names(node) for node in NODES)


def forget_others(name: str) -> None:
    """Remove the repository's other images: each takes gigabytes."""
    repository = name.rpartition(":")[0]
    for node in NODES:
        others = [one for one in _names(node) if one.startswith(f"{repository}:")]
        if old := [one for one in others if one != name]:
            inside(*_images(node), "rm", *old)


def tag(name: str, other: str) -> None:
    """Another name for an image."""
    for node in NODES:
        inside(*_images(node), "tag", "--force", name, other)


def _images(node: Node) -> list[str]:
    return ["ctr", "--address", node.socket, "-n", "k8s.io", "images"]


def _names(node: Node) -> list[str]:
    return inside(*_images(node), "ls", "-q").stdout.split()


def _link(inner: int) -> None:
    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    def ip_inside(*arguments: str) -> None:
        subprocess.run(["nsenter", f"--target={inner}", "--net", "ip", *arguments], check=True)

    ip("link", "add", LINK, "type", "veth", "peer", "name", INNER_LINK, "netns", str(inner))
    ip("address", "add", f"{OUTSIDE}/24", "dev", LINK)
    ip("link", "set", LINK, "up")
    ip_inside("link", "set", INNER_LINK, "up")
    for node in reversed(NODES):  # the first one's last: daemons wait for it
        ip_inside("address", "add", f"{node.address}/24", "dev", INNER_LINK)
    ip_inside("route", "add", "default", "via", OUTSIDE)
    # Services and pods can be called from here. Routes go with the link, and it with the cluster.
    for network in (SERVICES, BRIDGE_NETWORK):
        ip("route", "add", network, "via", INSIDE)


def _make_cgroups() -> None:
    for controller in _CGROUPS.iterdir():
        if not (controller / "cgroup.procs").exists() or controller.is_symlink():
            continue
        for node in NODES:
            group = controller / node.cgroup
            group.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):  # version 1: not inherited
                if (group / name).exists():
                    (group / name).write_text((controller / name).read_text())


def _remove_cgroup(group: Path) -> None:
    if not group.is_dir():
        return
    for child in group.iterdir():
        if child.is_dir():
            _remove_cgroup(child)
    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:  # its last process is not quite gone
            time.sleep(0.1)
    say(f"cannot be removed: {group}")
