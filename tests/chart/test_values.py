"""Values that are wrong, and what is said of them: key, limit, value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests.chart.conftest import CHART, INGRESS, Object

Refuse = Callable[..., str]

SCHEMA: Object = json.loads((CHART / "values.schema.json").read_text())


def walk(schema: Any, path: str) -> Iterator[tuple[str, Object]]:
    if isinstance(schema, dict):
        yield path, schema
        for key, value in schema.items():
            yield from walk(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from walk(value, f"{path}/{index}")


def test_no_object_of_the_schema_takes_keys_it_does_not_name() -> None:
    # Parts that are Kubernetes' own, which the API server checks.
    theirs = ("affinity", "env", "extraVolumes", "global")
    for path, schema in walk(SCHEMA, ""):
        if "properties" in schema and isinstance(schema.get("type"), str):
            assert schema.get("additionalProperties") is False, path
        elif schema.get("type") == "object" and "additionalProperties" not in schema:
            assert any(f"/{name}/" in f"{path}/" for name in theirs), path


def test_the_schema_names_every_value_and_no_other() -> None:
    def names(schema: Object, values: Any, path: str) -> None:
        if "$ref" in schema or "properties" not in schema or not isinstance(values, dict):
            return
        assert set(schema["properties"]) - {"global"} == set(values), path
        for key, value in values.items():
            names(schema["properties"][key], value, f"{path}.{key}")

    names(SCHEMA, yaml.safe_load((CHART / "values.yaml").read_text()), "values")


def value(path: str, given: Any) -> Object:
    for key in reversed(path.split(".")):
        given = {key: given}
    return given


@pytest.mark.parametrize(
    ("path", "given", "limit"),
    [
        ("engine.max_batch_size", 2000, "1,?024"),
        ("engine.max_batch_size", "many", "want integer"),
        ("engine.kind", "vllm", "continuous"),
        ("limits.body_bytes", 10, "1,?024"),
        ("limits.full_status", 500, "429"),
        ("model.dtype", "float16", "bfloat16"),
        ("model.max_input_tokens", 8, "16"),
        ("auth.mode", "basic", "trusted-header"),
        ("auth.header", "X Client", "pattern"),
        ("api.replicas", 0, "want 1"),
        ("api.workers.resources.requests.cpu", "two", "pattern"),
        ("summarizer.autoscaling_config.max_replicas", 0, "want 1"),
        ("summarizer.autoscaling_config.look_back_period_s", 10, "want 10"),
        ("summarizer.max_surge_percent", 101, "want 100"),
        ("summarizer.gpu.resourceName", "gpu", "pattern"),
        ("image.digest", "sha256:12", "pattern"),
        ("image.pullPolicy", "Sometimes", "IfNotPresent"),
        ("rayVersion", "nightly", "pattern"),
        ("ingress.rateLimit.rate", "60/min", "pattern"),
        ("ingress.host", "http://x", "pattern"),
        ("service.type", "ExternalName", "LoadBalancer"),
        ("securityContext.runAsUser", 0, "want 1"),
        ("gcsFaultTolerance.redisAddress", "redis", "pattern"),
        ("fullnameOverride", "A" * 10, "pattern"),
        ("fullnameOverride", "a" * 48, "pattern"),
        ("tokens.prune.schedule", "often", "pattern"),
    ],
)
def test_a_bad_value_is_refused_by_its_key(
    refuse: Refuse, path: str, given: Any, limit: str
) -> None:
    said = refuse(value(path, given))
    assert f"/{path.replace('.', '/')}'" in said
    assert re.search(limit, said), said


@pytest.mark.parametrize(
    "path",
    [
        "replicaCount",
        "image.name",
        "engine.max_batchsize",
        "limits.bodyBytes",
        "summarizer.autoscaling_config.maxReplicas",
        "summarizer.workers.resource",
        "api.workers.resources.request",
        "ingress.tls.secret",
        "networkPolicy.operator.namespaceselector",
    ],
)
def test_an_unknown_key_is_refused_by_its_name(refuse: Refuse, path: str) -> None:
    where, _, key = path.rpartition(".")
    said = refuse(value(path, 1))
    assert f"additional properties '{key}' not allowed" in said
    assert f"'{'/' + where.replace('.', '/') if where else ''}'" in said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"ingress": {"enabled": True}},
            "ingress.host: required with ingress.enabled, is empty",
        ),
        (
            {**INGRESS, "auth": {"mode": "token"}},
            'auth.mode: must be trusted-header with ingress.enabled, is "token"',
        ),
        (
            {**INGRESS, "networkPolicy": {"enabled": False}},
            "networkPolicy.enabled: must be true with auth.mode trusted-header, is false",
        ),
        (
            {**INGRESS, "service": {"type": "LoadBalancer"}},
            'service.type: must be ClusterIP with auth.mode trusted-header, is "LoadBalancer"',
        ),
        (
            {"model": {"source": "pvc", "name": "t5"}},
            "model.pvc.claimName: required with model.source pvc, is empty",
        ),
        (
            {"model": {"name": "google-t5/t5-small"}},
            "model.name: must be demo or an absolute folder with model.source image, is "
            '"google-t5/t5-small"',
        ),
        (
            {"model": {"source": "hub"}},
            'model.name: must be a hub repository (owner/name) with model.source hub, is "demo"',
        ),
        (
            {"model": {"revision": "main"}},
            'model.revision: only with model.source hub, which is "image"',
        ),
        (
            {"limits": {"default_timeout_s": 400}},
            "limits.default_timeout_s: must be at most limits.timeout_s (300), is 400",
        ),
        (
            {"limits": {"timeout_s": 600}},
            "drain.timeoutSeconds: must be at least limits.timeout_s (600), is 300",
        ),
        (
            {"summarizer": {"autoscaling_config": {"min_replicas": 5}}},
            "summarizer.autoscaling_config.min_replicas: must be at most max_replicas (4), is 5",
        ),
        (
            {"summarizer": {"autoscaling_config": {"initial_replicas": 9}}},
            "summarizer.autoscaling_config.initial_replicas: must be min_replicas (1) to "
            "max_replicas (4), is 9",
        ),
        (
            {"summarizer": {"autoscaling_config": {"max_replicas": 64}}},
            "summarizer.workers.maxReplicas: must be at least 80 for 64 replicas and their surge, "
            "is 32",
        ),
        (
            {"api": {"workers": {"minReplicas": 40}}},
            "api.workers.minReplicas: must be at most maxReplicas (32), is 40",
        ),
        (
            {"api": {"num_cpus": 3}},
            "api.num_cpus: 3 for each of 1 replicas of a pod is above the pod's 2 CPUs "
            "(api.workers.resources)",
        ),
        (
            {"summarizer": {"num_gpus": 0}},
            "summarizer.num_gpus: must be above 0 with summarizer.gpu.enabled, is 0",
        ),
        (
            {"summarizer": {"num_gpus": 2}},
            "summarizer.num_gpus: 2 for each of 1 replicas of a pod is above summarizer.gpu.count "
            "(1)",
        ),
        (
            {"gcsFaultTolerance": {"enabled": True}},
            "gcsFaultTolerance.redisAddress: required with gcsFaultTolerance.enabled, is empty",
        ),
        (
            {"ingress": {**INGRESS["ingress"], "readTimeoutSeconds": 300}},
            "ingress.readTimeoutSeconds: must be above limits.timeout_s (300), is 300",
        ),
        (
            {"ingress": {**INGRESS["ingress"], "tls": {"certManager": {"clusterIssuer": "x"}}}},
            "ingress.tls.secretName: required with ingress.tls.certManager, is empty",
        ),
        (
            {
                "ingress": {
                    **INGRESS["ingress"],
                    "dashboard": {"enabled": True, "host": "ray.example.com"},
                }
            },
            "ingress.dashboard.basicAuthSecret: required with ingress.dashboard.enabled, is empty",
        ),
    ],
    ids=lambda given: given.partition(":")[0] if isinstance(given, str) else "",
)
def test_values_that_do_not_go_together_are_refused(
    refuse: Refuse, values: Object, said: str
) -> None:
    assert said in " ".join(refuse(values).split())


def test_all_errors_are_told_at_once(refuse: Refuse) -> None:
    said = refuse({"summarizer": {"num_gpus": 2, "num_cpus": 9}, "api": {"num_cpus": 9}})
    for key in ("summarizer.num_gpus", "summarizer.num_cpus", "api.num_cpus"):
        assert f"{key}:" in said


def test_a_release_name_that_ray_cannot_take_is_refused(refuse: Refuse) -> None:
    # A Service's name begins with a letter; Helm's release names need not.
    assert "fullnameOverride: the name must" in refuse({}, name="1st")


def test_strings_stay_strings_whatever_they_look_like(render: Callable[..., Any]) -> None:
    release = render(
        {
            "auth": {"mode": "off", "header": "123"},
            "image": {"repository": "r", "tag": "1.0", "pullSecrets": ["1"]},
            "serviceAccount": {"create": False, "name": "2"},
            "rayAuth": {"existingSecret": "3"},
            "gcsFaultTolerance": {
                "enabled": True,
                "redisAddress": "r:1",
                "passwordSecret": {"name": "4", "key": "5"},
            },
            "head": {"priorityClassName": "6"},
        },
        name="t5-summarizer",
    )
    assert release.arguments["auth"] == {"mode": "off", "header": "123"}
    head = release.pod("head")
    assert head["imagePullSecrets"] == [{"name": "1"}]
    assert head["serviceAccountName"] == "2"
    assert head["priorityClassName"] == "6"
    assert release.cluster["authOptions"]["secretName"] == "3"
    secret = release.cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    assert secret["secretKeyRef"] == {"name": "4", "key": "5"}
