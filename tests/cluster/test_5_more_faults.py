"""Rarer faults, under constant load: `make test-cluster FAULTS=1`.

They take some 12 minutes more, most of it waiting for what Kubernetes and Ray give up only after
minutes. Each is a figure of docs/reliability.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster import kube, machine
from tests.cluster.daemons import RUN
from tests.cluster.load import Load
from tests.cluster.network import DNS, NODES
from tests.cluster.release import GPU_NODE, Release
from tests.cluster.sidecar import SidecarLogs

_RATE = 2.0
_SETTLE_S = 5.0
_FEW = 0.01  # of requests: what a fault beside the data path may cost
_NOT_READY = 0.05  # of requests, while Kubernetes takes nodes for lost that it could not ask
_STOPPED_S = 60.0
_TWO = "--set=summarizer.autoscaling_config.min_replicas=2"
_ACCELERATOR = "cloud.google.com/gke-accelerator"
# By the image's own Python: a small image has no mount(8).
_LIBC = "import ctypes; libc = ctypes.CDLL(None); folder = b'/var/log/t5-serve'\n"
_MOUNT = (
    _LIBC + "assert libc.mount(b'tmpfs', folder, b'tmpfs', 0, b'size=64k,mode=1777') == 0\n"
    "file = open(folder + b'/filler', 'wb', buffering=0)\n"
    "try:\n    while file.write(b'x' * 4096): pass\nexcept OSError: pass\n"
)
_UNMOUNT = _LIBC + "assert libc.umount2(folder, 2) == 0  # MNT_DETACH"

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("T5_CLUSTER_FAULTS") != "1",
        reason="12 minutes more: make test-cluster FAULTS=1",
    ),
    pytest.mark.timeout(2_400),
]
Figure = Callable[[str, str], None]


@pytest.fixture(scope="module", autouse=True)
def two_replicas(release: Release) -> None:
    """Of each deployment, so that one may die."""
    release.upgrade(_TWO)
    kube.until("two engine replicas", lambda: len(kube.replicas("Summarizer")) == 2, 240)
    kube.until("the service is up", kube.serving)


def _told(load: Load, since: float) -> str:
    return f"{load.summary()}, longest without an answer {load.gap(since):.1f} s"


@pytest.fixture
def another_gpu_node() -> Iterator[None]:
    """The other node offers GPUs, too, until the test is over."""
    node = ("node", NODES[0].name)
    capacity = '{"status": {"capacity": {"nvidia.com/gpu": COUNT}}}'
    kube.kubectl("label", *node, f"{_ACCELERATOR}=nvidia-l4", "--overwrite")
    patch = ("patch", *node, "--subresource=status", "--type=merge")
    kube.kubectl(*patch, f"--patch={capacity.replace('COUNT', '6')}")
    yield
    kube.kubectl("uncordon", GPU_NODE)
    kube.kubectl("label", *node, f"{_ACCELERATOR}-")
    kube.kubectl(*patch, f"--patch={capacity.replace('COUNT', 'null')}")


def test_the_engines_node_is_drained(
    release: Release, token: str, figure: Figure, another_gpu_node: None
) -> None:
    with Load(release.url, token, _RATE) as load:
        time.sleep(_SETTLE_S)
        began, since = time.monotonic(), load.now()
        # Its budget lets the drain take one engine pod at a time, each once another is Ready.
        kube.kubectl(
            "drain", GPU_NODE, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=600s"
        )
        drained = time.monotonic() - began
        kube.until("two engine replicas", lambda: len(kube.replicas("Summarizer")) == 2, 300)
        kube.until("the service is up", kube.serving, 240)
        took = time.monotonic() - began
        time.sleep(_SETTLE_S)
    figure(
        "the engines' node drained",
        f"empty after {drained:.0f} s, whole after {took:.0f} s, {_told(load, since)}",
    )
    assert {p["spec"]["nodeName"] for p in kube.pods("summarizer")} == {NODES[0].name}
    assert load.failed == []


def _gcs() -> str:
    """The GCS' process in the head, as the head numbers it, with the container's own start."""
    container = "ray-head"
    number = kube.execute(kube.head(), "pgrep", "-x", "gcs_server", container=container).strip()
    statuses = kube.get("pod", kube.head())["status"]["containerStatuses"]
    [restarts] = [one["restartCount"] for one in statuses if one["name"] == container]
    return f"{kube.head()}/{restarts}/{number}" if number else ""


def test_the_gcs_is_killed(release: Release, token: str, figure: Figure) -> None:
    before = kube.until("the GCS is seen", _gcs)
    api = kube.names(kube.pods("api"))
    with Load(release.url, token, _RATE) as load:
        time.sleep(_SETTLE_S)
        began, since = time.monotonic(), load.now()
        number = before.rpartition("/")[2]
        kube.execute(kube.head(), "kill", "-9", number, container="ray-head")
        kube.until("another GCS", lambda: (now := _gcs()) and now != before, 300)
        kube.until("the head is ready", lambda: kube.ready(kube.get("pod", kube.head())), 240)
        kube.until("the service is up", kube.serving, 240)
        took = time.monotonic() - began
        time.sleep(_SETTLE_S)
    figure("GCS killed, state in Redis", f"back after {took:.0f} s, {_told(load, since)}")
    # The workers have stayed. A replica on one may have been replaced by the new controller.
    assert kube.names(kube.pods("api")) == api
    assert len(load.failed) <= _FEW * len(load.answers)


def test_redis_is_restarted(release: Release, token: str, figure: Figure) -> None:
    def answers() -> bool:
        return machine.inside("redis-cli", "-h", DNS, "ping", check=False).stdout.strip() == "PONG"

    before = set(kube.redis_keys())
    assert before
    with Load(release.url, token, _RATE) as load:
        time.sleep(_SETTLE_S)
        began, since = time.monotonic(), load.now()
        machine.inside("pkill", "-KILL", "-x", "redis-server")
        kube.until("Redis answers", answers, 60)
        redis = time.monotonic() - began
        # The head may end for it: Kubernetes starts it again, and it reads its state back.
        time.sleep(_STOPPED_S)
        kube.until("the head is ready", lambda: kube.ready(kube.get("pod", kube.head())), 300)
        kube.until("the service is up", kube.serving, 300)
        time.sleep(_SETTLE_S)
    statuses = kube.get("pod", kube.head())["status"]["containerStatuses"]
    restarts = sum(one["restartCount"] for one in statuses if one["name"] == "ray-head")
    figure(
        "Redis killed, its state on disk",
        f"Redis back after {redis:.0f} s, the head's container has started {restarts} times "
        f"again so far, {_told(load, since)}",
    )
    # It has kept what it had.
    assert before <= set(kube.redis_keys())
    assert len(load.failed) <= _FEW * len(load.answers)


def test_the_api_server_is_gone_for_a_minute(release: Release, token: str, figure: Figure) -> None:
    engines, api = kube.replicas("Summarizer"), kube.replicas("Api")
    with Load(release.url, token, _RATE) as load:
        time.sleep(_SETTLE_S)
        since = load.now()
        machine.inside("pkill", "-STOP", "-x", "kube-apiserver")
        try:
            time.sleep(_STOPPED_S)
        finally:
            machine.inside("pkill", "-CONT", "-x", "kube-apiserver")
        resumed, began = load.now(), time.monotonic()
        kube.until("the service is up", kube.serving, 300)
        took = time.monotonic() - began
        time.sleep(30)  # controllers now act on what they could not see
        kube.until("the service is up", kube.serving, 300)
    figure(
        "API server stopped for 60 s",
        f"the service's state is told again after {took:.0f} s, {_told(load, since)}",
    )
    # Nothing on a request's way asks it. Once it is back, nodes may be NotReady for some seconds,
    # and then nothing is sent to them.
    assert [one for one in load.failed if one.sent < resumed] == []
    assert len(load.failed) <= _NOT_READY * len(load.answers)
    assert kube.replicas("Api") == api
    assert kube.replicas("Summarizer") == engines


@pytest.fixture
def full_disk() -> Iterator[str]:
    """An Api pod whose usage events meet a full disk, until the test is over."""
    pod = sorted(kube.names(kube.pods("api")))[0]
    uid = kube.get("pod", pod)["metadata"]["uid"]
    # A small disk of its own over the folder, in the container's own view: the node's real one
    # cannot be filled without stopping everything else on it.
    find = f"grep -l {uid} /proc/[0-9]*/cgroup | cut -d/ -f3 | while read id; do "
    find += "grep -aq '^ray::ServeReplica' /proc/$id/cmdline && echo $id && break; done"
    replica = machine.inside("bash", "-c", find, check=False).stdout.split()[0]
    inside = ("nsenter", f"--target={replica}", "--mount", "/opt/venv/bin/python", "-c")
    machine.inside(*inside, _MOUNT)
    # What was open lies underneath, and would go on being written.
    volume = f"{RUN}/kubelet-*/pods/{uid}/volumes/kubernetes.io~empty-dir/*/usage-*.jsonl"
    machine.inside("bash", "-c", f"rm -f {volume}")
    yield pod
    machine.inside(*inside, _UNMOUNT)


def test_a_full_disk_costs_usage_events_and_no_request(
    release: Release, token: str, figure: Figure, request: pytest.FixtureRequest
) -> None:
    with SidecarLogs() as logs, Load(release.url, token, _RATE) as load:
        time.sleep(_SETTLE_S)
        filled = load.now()
        pod = request.getfixturevalue("full_disk")
        time.sleep(20)
    passed_on = logs.requests()
    missing = [one for one in load.answers if not passed_on[one.request_id]]
    figure(
        f"disk of usage events full in {pod}",
        f"{load.summary()}, {len(missing)} of {len(load.answers)} usage events lost",
    )
    assert load.failed == []
    # The other pod has room, and until then so had this one.
    assert 0 < len(missing) < len(load.answers)
    assert [one for one in missing if one.done < filled - 5] == []
    assert max(passed_on.values()) == 1


def test_usage_events_come_again_once_there_is_room(release: Release, token: str) -> None:
    with SidecarLogs() as logs, Load(release.url, token, _RATE) as load:
        time.sleep(10)
    passed_on = logs.requests()
    assert {one.request_id: passed_on[one.request_id] for one in load.answers} == {
        one.request_id: 1 for one in load.answers
    }


@pytest.fixture
def without_redis(release: Release) -> Iterator[None]:
    """A cluster whose head keeps its state to itself; afterwards one with Redis, as before."""
    # With one engine each: where the drain left them, there is no room for those of two clusters.
    release.upgrade()
    kube.until("one engine replica", lambda: len(kube.replicas("Summarizer")) == 1, 240)
    kube.until("one engine pod", lambda: len(kube.pods("summarizer")) == 1, 240)
    _new_cluster(release, "--set=gcsFaultTolerance.enabled=false")
    yield
    _new_cluster(release, _TWO)


def _new_cluster(release: Release, *settings: str) -> None:
    before = kube.active_cluster()
    release.upgrade(*settings)
    kube.until(
        "the new cluster serves",
        lambda: kube.serving() and kube.active_cluster() != before,
        600,
    )
    # The next change needs the old one's room.
    kube.until("one cluster is left", lambda: len(kube.items("raycluster")) == 1, 300)


def test_the_head_is_killed_without_redis(
    release: Release, token: str, figure: Figure, without_redis: None
) -> None:
    before, cluster = kube.head(), kube.active_cluster()
    with Load(release.url, token, _RATE) as load:
        time.sleep(_SETTLE_S)
        began, since = time.monotonic(), load.now()
        kube.kubectl("delete", "pod", before, "--grace-period=0", "--force")
        time.sleep(30)  # the service's state is of before for some seconds

        def back() -> bool:
            return kube.serving() and release.ask(token).status_code == 200

        kube.until("summaries again", back, 1_200, every=3)
        took = time.monotonic() - began
        time.sleep(_SETTLE_S)
    new = "another cluster" if kube.active_cluster() != cluster else "the same cluster"
    figure(
        "head killed, without Redis", f"back after {took:.0f} s ({new}), {_told(load, since)}"
    )  # fmt: skip
    # No promise: it is an outage, and ends without anybody's help.
    assert release.always(token, 200)
