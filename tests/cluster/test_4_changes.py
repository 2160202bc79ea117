"""Changes under constant load: no request may fail."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.cluster import kube, machine
from tests.cluster.load import Load
from tests.cluster.release import Release

_RATE = 4.0
# A second cluster starts beside the one that serves, on the same processors.
_RATE_BESIDE_A_START = 1.0
_TIMEOUT_BESIDE_A_START_S = 230.0


def test_a_change_of_scaling_touches_no_replica(
    release: Release, token: str, figure: Callable[[str, str], None]
) -> None:
    before, cluster = kube.replicas("Summarizer") | kube.replicas("Api"), kube.active_cluster()
    with Load(release.url, token, _RATE) as load:
        release.upgrade("--set=summarizer.autoscaling_config.min_replicas=2")
        began = time.monotonic()
        kube.until("a second replica", lambda: len(kube.replicas("Summarizer")) == 2, 180)
        kube.until("the service is up", kube.serving)
        took = time.monotonic() - began
    assert before.items() <= (kube.replicas("Summarizer") | kube.replicas("Api")).items()
    assert kube.active_cluster() == cluster
    figure("in place, min_replicas 1 to 2", f"{took:.0f} s, {load.summary()}")
    assert load.answers
    assert load.failed == []


def test_a_change_of_settings_replaces_replicas_in_place(
    release: Release, token: str, figure: Callable[[str, str], None]
) -> None:
    before, cluster = kube.replicas("Summarizer") | kube.replicas("Api"), kube.active_cluster()
    pods = kube.names(kube.pods("api"))
    most = 0
    with Load(release.url, token, _RATE) as load:
        release.upgrade(
            "--set=summarizer.autoscaling_config.min_replicas=2", "--set=limits.num_beams=6"
        )
        began = time.monotonic()

        def replaced() -> bool:
            nonlocal most
            now = kube.replicas("Summarizer")
            most = max(most, len(now))
            return not before.keys() & (now | kube.replicas("Api")).keys()

        kube.until("all replicas are new", replaced, 240)
        kube.until("the service is up", kube.serving)
        took = time.monotonic() - began
    assert kube.active_cluster() == cluster
    assert kube.names(kube.pods("api")) == pods
    figure(
        "in place, limits.num_beams",
        f"{took:.0f} s, at most {most} engine replicas at once, {load.summary()}",
    )
    assert load.failed == []


def test_a_new_image_builds_a_new_cluster(
    release: Release, token: str, figure: Callable[[str, str], None]
) -> None:
    other = release.image + "-next"
    machine.tag(release.image, other)
    cluster, began = kube.active_cluster(), time.monotonic()
    load = Load(release.url, token, _RATE_BESIDE_A_START, timeout_s=_TIMEOUT_BESIDE_A_START_S)
    with load:
        # With the two engine replicas that the next tests want.
        release.upgrade("--set=summarizer.autoscaling_config.min_replicas=2", image=other)
        kube.until(
            "the new cluster serves",
            lambda: kube.serving() and kube.active_cluster() != cluster,
            420,
        )
        took = time.monotonic() - began
    release.image = other
    assert kube.images() == {other}
    figure("new image", f"serves after {took:.0f} s, {load.summary()}")
    assert load.failed == []
