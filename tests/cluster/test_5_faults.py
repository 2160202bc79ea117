"""What dies under constant load, and what clients see of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.cluster import kube
from tests.cluster.load import Load
from tests.cluster.release import Release
from tests.cluster.sidecar import SidecarLogs

# Replicas start on the processors that serve.
_RATE = 2.0
_TIMEOUT_S = 230.0
_SETTLE_S = 5.0


@pytest.fixture(scope="module", autouse=True)
def two_replicas(release: Release) -> None:
    """Of each deployment, so that one may die."""
    release.upgrade("--set=summarizer.autoscaling_config.min_replicas=2")
    kube.until("two engine replicas", lambda: len(kube.replicas("Summarizer")) == 2, 240)
    kube.until("the service is up", kube.serving)


@pytest.mark.parametrize("deployment", ["Summarizer", "Api"])
def test_a_replica_is_killed(
    release: Release, token: str, figure: Callable[[str, str], None], deployment: str
) -> None:
    before = kube.replicas(deployment)
    victim = next(iter(before))
    with SidecarLogs() as logs, Load(release.url, token, _RATE, timeout_s=_TIMEOUT_S) as load:
        time.sleep(_SETTLE_S)
        pod, number = victim.split("/")
        began, killed = time.monotonic(), load.now()
        kube.execute(pod, "kill", "-9", number)
        kube.until(
            "another replica in its place",
            lambda: len(now := kube.replicas(deployment)) == len(before) and victim not in now,
            180,
        )
        took = time.monotonic() - began
        kube.until("the service is up", kube.serving)
    passed_on = logs.requests()
    missing = [a for a in load.answers if not passed_on[a.request_id]]
    figure(
        f"{deployment} replica killed",
        f"replaced after {took:.0f} s, {load.summary()}, "
        f"{len(missing)} of {len(load.answers)} usage events lost",
    )
    # What an Api replica has in its hands dies with it, for only a client (or the ingress) can send
    # it again, and its last usage events may be lost. All others are answered and come once.
    for answer in load.answers:
        if not (deployment == "Api" and answer.sent <= killed + 1 and answer.done >= killed - 1):
            assert (answer.status, passed_on[answer.request_id]) == (200, 1), answer


@pytest.mark.parametrize("component", ["summarizer", "api"])
def test_a_worker_pod_is_deleted(
    release: Release, token: str, figure: Callable[[str, str], None], component: str
) -> None:
    victim, count = sorted(kube.names(kube.pods(component)))[0], len(kube.pods(component))
    with SidecarLogs() as logs, Load(release.url, token, _RATE, timeout_s=_TIMEOUT_S) as load:
        time.sleep(_SETTLE_S)
        began = time.monotonic()
        kube.kubectl("delete", "pod", victim, "--wait=false")
        kube.until(
            "another ready pod in its place",
            lambda: sum(kube.ready(pod) for pod in kube.pods(component)) == count,
            240,
        )
        took = time.monotonic() - began
        kube.kubectl("wait", f"pod/{victim}", "--for=delete", "--timeout=120s")
        gone = time.monotonic() - began
    figure(
        f"{component} pod deleted",
        f"replaced after {took:.0f} s, drained and gone after {gone:.0f} s, {load.summary()}",
    )
    assert load.failed == []
    # An orderly end loses no usage event and repeats none.
    passed_on = logs.requests()
    assert {a.request_id: passed_on[a.request_id] for a in load.answers} == {
        a.request_id: 1 for a in load.answers
    }


def test_the_head_pod_is_killed(
    release: Release, token: str, figure: Callable[[str, str], None]
) -> None:
    before = kube.head()
    api, engines = set(kube.replicas("Api")), set(kube.replicas("Summarizer"))
    with Load(release.url, token, _RATE, timeout_s=_TIMEOUT_S) as load:
        time.sleep(_SETTLE_S)
        began, since = time.monotonic(), load.now()
        kube.kubectl("delete", "pod", before, "--grace-period=0", "--force")
        kube.until("another head", lambda: kube.head() != before, 240)
        head = kube.head()
        kube.until("the head is ready", lambda: kube.ready(kube.get("pod", head)), 240)
        kube.until("the service is up", kube.serving, 240)
        took = time.monotonic() - began
        time.sleep(_SETTLE_S)
    # The workers stayed. (Of engines there may be fewer: those without work go meanwhile.)
    assert set(kube.replicas("Api")) == api
    assert set(kube.replicas("Summarizer")) & engines
    figure(
        "head pod killed, state in Redis",
        f"back after {took:.0f} s, {load.summary()}, longest without an answer "
        f"{load.gap(since):.1f} s",
    )
    # Workers serve without a head; counted above, and none is expected to fail.
    assert len(load.failed) <= len(load.answers) // 100
