"""The container that passes usage events on, and the volume they are on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from serve_app.config import RateLimitSettings, ServiceSettings
from serve_app.usage.limits import Call, values
from tests.chart.conftest import INGRESS, Object, Rendered
from tests.chart.schemas import available, problems

Render = Callable[..., Rendered]
ON: Object = {"usage": {"sidecar": {"enabled": True}}}


def test_the_sidecar_is_in_api_pods_and_only_if_wanted(render: Render) -> None:
    on, off = render(ON), render()
    [sidecar] = on.pod("api")["initContainers"]
    assert sidecar["name"] == "usage"
    # Starts anew in a pod with `restartPolicy: Never`, and outlives the replicas.
    assert sidecar["restartPolicy"] == "Always"
    assert "initContainers" not in off.pod("api")
    for release in (on, off):
        for pod in ("head", "summarizer"):
            assert "initContainers" not in release.pod(pod)
            assert "usage" not in [one["name"] for one in release.pod(pod)["volumes"]]


def test_it_reads_where_the_service_writes(render: Render) -> None:
    release = render(ON)
    folder = release.arguments["usage"]["folder"]
    pod = release.pod("api")
    [sidecar], [worker] = pod["initContainers"], pod["containers"]
    assert sidecar["command"] == ["t5-serve", "usage", "tail", "--follow", "--folder", folder]
    assert sidecar["image"] == worker["image"]
    assert sidecar["volumeMounts"] == [{"name": "usage", "mountPath": folder}]
    assert {"name": "usage", "mountPath": folder} in worker["volumeMounts"]


def test_it_is_locked_as_the_worker_is_and_small(render: Render) -> None:
    # tests/chart/test_objects.py holds it against the restricted level, in ci/gke-l4-values.yaml.
    pod = render(ON).pod("api")
    [sidecar], [worker] = pod["initContainers"], pod["containers"]
    assert sidecar["securityContext"] == worker["securityContext"]
    assert sidecar["resources"]["requests"] == {"cpu": "10m", "memory": "64Mi"}
    assert sidecar["resources"]["limits"] == {"memory": "128Mi"}
    assert "env" not in sidecar


def test_the_volume_holds_all_files_at_their_largest(render: Render) -> None:
    values: Object = {
        "usage": {"keep": 3, "max_bytes": 2_000_000},
        "api": {"replicasPerWorker": 2, "num_cpus": 0.5},
    }
    pod = render(values).pod("api")
    [volume] = [one for one in pod["volumes"] if one["name"] == "usage"]
    # Three that are kept, the one each of two replicas writes, each one batch above its size.
    assert int(volume["emptyDir"]["sizeLimit"]) == 5 * (2_000_000 + 1024 * 1024)


def test_without_events_there_is_neither_volume_nor_sidecar(
    render: Render, refuse: Callable[..., str]
) -> None:
    release = render({"usage": {"enabled": False}})
    assert "usage" not in [one["name"] for one in release.pod("api")["volumes"]]
    assert ServiceSettings.model_validate(release.arguments).usage.enabled is False
    said = refuse({"usage": {"enabled": False, "sidecar": {"enabled": True}}})
    assert "usage.enabled: must be true with usage.sidecar.enabled" in said


def test_the_cluster_takes_a_sidecar(render: Render) -> None:
    service = render(ON).one("RayService")
    if not available(service):
        pytest.skip("no schema")
    assert problems(service) == []


def test_the_chart_takes_suggested_limits(render: Render) -> None:
    busy = [minute * 60 + second for minute in range(30) for second in range(0, 60, 2)]
    arrivals = {"a": [0.0, 60.0], "b.c": [*map(float, busy)], "d": [0.0]}
    work = {
        client: [Call(at, at + 1, asked=90, used=100) for at in times]
        for client, times in arrivals.items()
    }
    suggested = yaml.safe_load(values(arrivals, work, 1.5))
    suggested["ingress"] |= INGRESS["ingress"]
    release = render(suggested)
    policies = {
        one["metadata"]["name"].removeprefix("t5-t5-summarizer-"): one["spec"]["rateLimit"]
        for one in release.all("Policy")
        if "rateLimit" in one["spec"]
    }
    assert policies["rate"]["rate"] == "2r/m"
    assert policies["rate-r50-b1"]["rate"] == "50r/m"
    [condition] = policies["rate-r50-b1"]["condition"]["variables"]
    assert condition["match"] == r"~^(?:b[.]c)(?:\.[0-9a-f]{8})?$"
    # Half as much again as 100 tokens a minute, and as the 90 of one call; b.c. has 3,000 a minute.
    sent = release.deployment("Api")["user_config"]["rate_limits"]
    limits = RateLimitSettings.model_validate(sent)
    assert limits.enabled
    assert (limits.tokens_per_minute, limits.burst_tokens) == (200, 200)
    [tier] = limits.tiers
    assert (tier.tokens_per_minute, tier.burst_tokens) == (5_000, 200)
