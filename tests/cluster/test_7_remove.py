"""What `helm uninstall` leaves."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.cluster import kube
from tests.cluster.kube import RELEASE
from tests.cluster.release import Release


def test_nothing_stays_but_tokens_and_the_account(
    release: Release, figure: Callable[[str, str], None]
) -> None:
    # An upgrade's old cluster went some time ago, and took its keys with it.
    kube.until("one cluster is left", lambda: len(kube.items("raycluster")) == 1, 240)
    # A cluster's keys are under its UID.
    clusters = [one["metadata"]["uid"] for one in kube.items("raycluster")]
    assert [key for key in kube.redis_keys() if any(uid in key for uid in clusters)]
    began = time.monotonic()
    kube.helm("uninstall", RELEASE)
    kinds = "rayservice,raycluster,pods,jobs,services,networkpolicies,poddisruptionbudgets"
    # The Job that clears Redis is among them: it has run, and went with its cluster.
    kube.until("all is gone", lambda: not kube.items(kinds), 240, every=3)
    figure("helm uninstall until all is gone", f"{time.monotonic() - began:.0f} s")
    # The tests of the ingress leave a Secret of their own.
    kept = kube.names(kube.items("secrets")) - {f"{RELEASE}-api-keys"}
    assert kept == {f"{RELEASE}-tokens"}
    assert kube.names(kube.items("serviceaccounts")) == {RELEASE}
    assert not [key for key in kube.redis_keys() if any(uid in key for uid in clusters)]
