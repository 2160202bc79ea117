"""What values make of Serve's configuration: accepted by the service and by Serve, and whole."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import annotated_types
import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from serve_app.config import ServiceSettings
from tests.chart.conftest import CHART, INGRESS, ROOT, Helm, Object, Rendered

Render = Callable[..., Rendered]

# Where a setting stands in the values, if not under its own name. What is None has no value:
# Serve's configuration itself says it, outside the application's arguments.
MOVED: dict[str, str | None] = {
    "model.name": "model.name",
    "replicas.min": "summarizer.autoscaling_config.min_replicas",
    "replicas.max": "summarizer.autoscaling_config.max_replicas",
    "replicas.target_ongoing_requests": "summarizer.autoscaling_config.target_ongoing_requests",
    "replicas.upscale_delay_s": "summarizer.autoscaling_config.upscale_delay_s",
    "replicas.downscale_delay_s": "summarizer.autoscaling_config.downscale_delay_s",
    "replicas.initial": "summarizer.autoscaling_config.initial_replicas",
    "replicas.downscale_to_zero_delay_s": "summarizer.autoscaling_config.downscale_to_zero_delay_s",
    "replicas.upscaling_factor": "summarizer.autoscaling_config.upscaling_factor",
    "replicas.downscaling_factor": "summarizer.autoscaling_config.downscaling_factor",
    "replicas.look_back_period_s": "summarizer.autoscaling_config.look_back_period_s",
    "replicas.aggregation_function": "summarizer.autoscaling_config.aggregation_function",
    "replicas.signal": "summarizer.autoscaling_config.signal",
    "replicas.target_drain_s": "summarizer.autoscaling_config.target_drain_s",
    "replicas.max_queued_requests": "summarizer.max_queued_requests",
    "replicas.num_cpus": "summarizer.num_cpus",
    "replicas.num_gpus": "summarizer.num_gpus",
    "replicas.max_ongoing_requests": "summarizer.max_ongoing_requests",
    "replicas.graceful_shutdown_timeout_s": "summarizer.graceful_shutdown_timeout_s",
    "replicas.health_check_period_s": "summarizer.health_check_period_s",
    "replicas.health_check_timeout_s": "summarizer.health_check_timeout_s",
    "auth.tokens_file": None,
    "usage.folder": None,
}


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


SETTINGS = dict(leaves(ServiceSettings))


def value_schema(path: str) -> Object:
    schema = json.loads((CHART / "values.schema.json").read_text())
    for key in path.split("."):
        schema = schema["properties"][key]
    return schema


def limits(field: FieldInfo) -> Object:
    """Bounds, choices and pattern of a setting, as a JSON schema says them."""
    said: Object = {}
    for rule in field.metadata:
        if isinstance(rule, annotated_types.Ge):
            said["minimum"] = rule.ge
        elif isinstance(rule, annotated_types.Gt):
            said["exclusiveMinimum"] = rule.gt
        elif isinstance(rule, annotated_types.Le):
            said["maximum"] = rule.le
        elif getattr(rule, "pattern", None):
            said["pattern"] = rule.pattern
    if typing.get_origin(field.annotation) is typing.Literal:
        said["enum"] = list(typing.get_args(field.annotation))
    return said


def nullable(field: FieldInfo) -> bool:
    return isinstance(field.annotation, types.UnionType) and type(None) in typing.get_args(
        field.annotation
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_has_a_value_with_the_same_limits(setting: str) -> None:
    path = MOVED.get(setting, setting)
    if path is None:
        return
    schema, wanted = value_schema(path), limits(SETTINGS[setting])
    if setting == "auth.mode":
        # Empty: the chart chooses.
        assert schema["enum"] == ["", *wanted["enum"]]
        return
    if "enum" in wanted:
        assert sorted(map(str, schema["enum"])) == sorted(map(str, wanted["enum"]))
        return
    if setting == "replicas.look_back_period_s":
        # Replicas and handles of a cluster report every 10 s; a shorter one is for trying things.
        wanted["exclusiveMinimum"] = 10
    for key in ("minimum", "exclusiveMinimum", "maximum", "pattern"):
        assert schema.get(key) == wanted.get(key), key
    if nullable(SETTINGS[setting]):
        assert "null" in schema["type"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_defaults_are_the_services_own_unless_said_here(setting: str) -> None:
    # What a cluster wants otherwise than one machine does.
    different = {
        "replicas.max": 4,
        "replicas.num_cpus": 2,
        "replicas.num_gpus": 1,
        "replicas.graceful_shutdown_timeout_s": None,  # follows limits.timeout_s
        "api.replicas": 2,
        "api.num_cpus": 1,
        "auth.mode": "",
    }
    path = MOVED.get(setting, setting)
    if path is None:
        return
    value: Any = yaml.safe_load((CHART / "values.yaml").read_text())
    for key in path.split("."):
        value = value[key]
    assert value == different.get(setting, SETTINGS[setting].default)


def test_the_service_accepts_the_arguments(ci_release: Rendered) -> None:
    ServiceSettings.model_validate(ci_release.arguments)


def test_every_value_reaches_the_arguments(render: Render) -> None:
    values: Object = {
        "model": {
            "source": "hub",
            "name": "org/t5",
            "revision": "abc",
            "device": "cuda:0",
            "dtype": "bfloat16",
            "max_input_tokens": 1024,
        },
        "engine": {
            "kind": "transformers",
            "threads": 3,
            "max_batch_size": 5,
            "max_batch_tokens": 1_000_003,
            "speculation": False,
            "max_waiting_requests": 11,
            "max_waiting_tokens": 16_777_217,
            "stall_s": 12.5,
        },
        "limits": {
            "body_bytes": 123_456_789,
            "input_tokens": 20,
            "max_new_tokens": 21,
            "num_beams": 2,
            "batch_texts": 3,
            "timeout_s": 99.5,
            "default_timeout_s": 9,
            "reduce_rounds": 2,
            "max_retry_after_s": 7,
            "full_status": 429,
        },
        "auth": {"mode": "off", "header": "X-Who"},
        "log": {"level": "ERROR"},
        "usage": {"enabled": False, "max_bytes": 100_000_001, "keep": 3, "queue_size": 17},
        "tracing": {"endpoint": "https://otel/x", "sample_ratio": 0.25, "queue_size": 9},
        "api": {"ready_step_age_s": 4, "parts_in_flight": 5},
    }
    settings = ServiceSettings.model_validate(render(values).arguments).model_dump()
    sent = {**values, "model": {**values["model"]}}
    del sent["model"]["source"]
    for section, held in sent.items():
        for key, value in held.items():
            assert settings[section][key] == value, f"{section}.{key}"


def test_rate_limits_reach_the_api_and_a_change_restarts_nothing(render: Render) -> None:
    limits: Object = {
        "enabled": True,
        "tokens_per_minute": 16_777_217,
        "burst_tokens": 123_456_789,
        "concurrent_requests": 7,
        "tiers": [
            {
                "name": "gold",
                "match": "web-shop|job[.]nightly",
                "tokens_per_minute": 0,
                "burst_tokens": 1_000_003,
                "concurrent_requests": 9,
            }
        ],
    }
    before, after = render(), render({"rate_limits": limits})
    sent = after.deployment("Api")["user_config"]["rate_limits"]
    assert ServiceSettings.model_validate({"rate_limits": sent}).rate_limits.model_dump() == limits
    # Serve restarts replicas for other arguments, not for another user_config.
    assert after.arguments == before.arguments
    assert before.deployment("Api")["user_config"]["rate_limits"]["enabled"] is False


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"tokens": 5}, "tokens"),
        ({"tokens_per_minute": -1}, "/rate_limits/tokens_per_minute"),
        ({"burst_tokens": 0}, "/rate_limits/burst_tokens"),
        ({"tiers": [{"name": "x", "match": "a"}]}, "tokens_per_minute"),
        (
            {"tiers": [{"name": "X", "match": "a", "tokens_per_minute": 1, "burst_tokens": 1}]},
            "/rate_limits/tiers/0/name",
        ),
    ],
)
def test_wrong_rate_limits_are_refused(helm: Helm, limits: Object, said: str) -> None:
    assert said in helm.refuse({"rate_limits": limits})


def test_serve_knows_every_key(ci_release: Rendered) -> None:
    # Serve drops keys that it does not know without a word.
    from ray.serve.schema import ServeDeploySchema

    def unknown(given: Any, taken: Any, path: str) -> list[str]:
        if isinstance(given, dict) and isinstance(taken, dict):
            return [
                said
                for key, value in given.items()
                for said in (
                    unknown(value, taken[key], f"{path}.{key}")
                    if key in taken
                    else [f"{path}.{key}"]
                )
            ]
        if isinstance(given, list) and isinstance(taken, list):
            return [
                said
                for index, (one, other) in enumerate(zip(given, taken, strict=True))
                for said in unknown(one, other, f"{path}[{index}]")
            ]
        return []

    taken = ServeDeploySchema.model_validate(ci_release.serve).model_dump(
        mode="json", exclude_unset=True, warnings=False
    )
    # Application arguments are the service's, and autoscaling_config is any mapping to the schema.
    assert unknown(ci_release.serve, taken, "serve") == []


def test_serve_takes_the_autoscaling(ci_release: Rendered) -> None:
    from ray.serve.config import AutoscalingConfig

    given = ci_release.deployment("Summarizer")["autoscaling_config"]
    taken = AutoscalingConfig.model_validate(given)
    assert set(given) <= set(type(taken).model_fields)


def test_scaling_by_tokens_is_a_policy_of_serves(render: Render) -> None:
    from ray.serve.config import AutoscalingConfig

    assert "policy" not in render().deployment("Summarizer")["autoscaling_config"]
    values = {"summarizer": {"autoscaling_config": {"signal": "tokens", "target_drain_s": 1.5}}}
    given = render(values).deployment("Summarizer")["autoscaling_config"]
    taken = AutoscalingConfig.model_validate(given)
    assert set(given) <= set(type(taken).model_fields)
    # Serve's controller makes it, by name.
    policy = taken.policy.get_policy()(**taken.policy.policy_kwargs)
    assert (type(policy).__name__, policy._target_drain_s) == ("TokenPolicy", 1.5)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"signal": "rows"}, "signal"), ({"target_drain_s": 0}, "target_drain_s")],
)
def test_wrong_signals_are_refused(helm: Helm, values: Object, said: str) -> None:
    assert f"/autoscaling_config/{said}" in helm.refuse(
        {"summarizer": {"autoscaling_config": values}}
    )


def test_what_scales_is_no_argument_so_that_changing_it_restarts_nothing(render: Render) -> None:
    before = render()
    after = render(
        {
            "api": {"replicas": 7, "max_ongoing_requests": 3},
            "summarizer": {
                "autoscaling_config": {"max_replicas": 9, "target_ongoing_requests": 2.5},
                "max_ongoing_requests": 5,
                "health_check_period_s": 3,
            },
        }
    )
    assert after.arguments == before.arguments
    assert after.deployment("Api")["num_replicas"] == 7
    summarizer = after.deployment("Summarizer")
    assert summarizer["autoscaling_config"]["max_replicas"] == 9
    assert summarizer["autoscaling_config"]["target_ongoing_requests"] == 2.5
    assert summarizer["max_ongoing_requests"] == 5
    for name in ("Api", "Summarizer"):
        assert (
            after.deployment(name)["ray_actor_options"]
            == before.deployment(name)["ray_actor_options"]
        )


def test_the_deployments_are_those_of_the_application() -> None:
    source = (ROOT / "serve_app" / "app.py").read_text()
    for name in ("Api", "Summarizer"):
        assert f"serve.deployment({name})" in source


def test_zero_replicas_at_least_still_begin_with_one(render: Render) -> None:
    scaling = render({"summarizer": {"autoscaling_config": {"min_replicas": 0}}}).deployment(
        "Summarizer"
    )["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"]) == (0, 1)


def test_replicas_may_finish_the_longest_request(render: Render) -> None:
    values = {"limits": {"timeout_s": 200.5}}
    for name in ("Api", "Summarizer"):
        assert render(values).deployment(name)["graceful_shutdown_timeout_s"] == 201


def test_who_checks_tokens_follows_from_the_ingress(render: Render) -> None:
    assert render().arguments["auth"] == {
        "mode": "token",
        "header": "X-Api-Client",
        "tokens_file": "/etc/t5-serve/tokens.json",
    }
    assert render(INGRESS).arguments["auth"] == {
        "mode": "trusted-header",
        "header": "X-Api-Client",
    }


def test_the_service_reads_tokens_where_their_secret_is_mounted(render: Render) -> None:
    release = render()
    pod = release.pod("api")
    [volume] = [one for one in pod["volumes"] if one["name"] == "tokens"]
    assert volume["secret"]["secretName"] == release.one("Secret")["metadata"]["name"]
    [container] = pod["containers"]
    [mount] = [one for one in container["volumeMounts"] if one["name"] == "tokens"]
    # By subPath a mounted Secret would never change.
    assert "subPath" not in mount
    assert release.arguments["auth"]["tokens_file"] == f"{mount['mountPath']}/tokens.json"
    assert "tokens" not in [one["name"] for one in release.pod("summarizer")["volumes"]]


def test_a_model_on_a_volume_is_read_from_its_mount(render: Render) -> None:
    values = {"model": {"source": "pvc", "name": "big/t5", "pvc": {"claimName": "models"}}}
    release = render(values)
    assert release.arguments["model"]["name"] == "/models/big/t5"
    for group in ("api", "summarizer"):
        pod = release.pod(group)
        [volume] = [one for one in pod["volumes"] if one["name"] == "model"]
        assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
        [container] = pod["containers"]
        [mount] = [one for one in container["volumeMounts"] if one["name"] == "model"]
        assert (mount["mountPath"], mount["readOnly"]) == ("/models", True)


def test_only_a_hub_model_may_be_fetched(render: Render) -> None:
    def environment(values: Object) -> Object:
        [container] = render(values).pod("summarizer")["containers"]
        return {one["name"]: one for one in container["env"]}

    assert environment({})["HF_HUB_OFFLINE"]["value"] == "1"
    hub = environment(
        {"model": {"source": "hub", "name": "a/b", "hub": {"tokenSecret": {"name": "hub"}}}}
    )
    assert "HF_HUB_OFFLINE" not in hub
    assert hub["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}


def test_the_autoscaler_sees_pods_that_hold_their_replicas_and_no_others(
    ci_release: Rendered,
) -> None:
    # Ray's own reading of the worker groups: what it will add for a replica that finds no place.
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _generate_available_node_types_from_ray_cr_spec,
    )

    kinds = _generate_available_node_types_from_ray_cr_spec(ci_release.cluster)
    offered = {name: kind["resources"] for name, kind in kinds.items()}

    def wanted(deployment: str) -> dict[str, float]:
        options = ci_release.deployment(deployment)["ray_actor_options"]
        return {
            "CPU": options["num_cpus"],
            "GPU": options.get("num_gpus", 0),
            **options["resources"],
        }

    def holds(group: str, deployment: str) -> bool:
        return all(
            offered[group].get(name, 0) >= amount for name, amount in wanted(deployment).items()
        )

    assert offered["headgroup"]["CPU"] == 0
    assert [name for name in offered if holds(name, "Api")] == ["api"]
    assert [name for name in offered if holds(name, "Summarizer")] == ["summarizer"]


def test_serve_builds_the_application_from_plain_arguments(render: Render) -> None:
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from serve_app.app import build

    arguments = render().arguments
    assert isinstance(call_user_app_builder_with_args_if_necessary(build, arguments), Application)
    arguments["engine"]["speed"] = "high"
    with pytest.raises(ValueError, match=r"engine\.speed"):
        call_user_app_builder_with_args_if_necessary(build, arguments)
