"""Entry point of the Serve application: settings in, two bound deployments out.

Two deployments, never one: the ingress takes no GPU, and in HAProxy mode Serve's autoscaler does
not see what queues at an ingress replica, only what queues in front of the Summarizer.
"""

from __future__ import annotations

from typing import Any, cast

from ray import serve
from ray.serve import Application

from serve_app import scaling
from serve_app.api.deployment import Api
from serve_app.config import ReplicaSettings, ServiceSettings
from serve_app.summarizer import Summarizer


def build(args: ServiceSettings | dict[str, Any]) -> Application:
    """Build the application. Use as `serve_app.app:build` in a Serve config or with `serve run`.

    Raises:
        pydantic.ValidationError: on unknown or bad settings.
    """
    # Serve hands over the plain `args` of a config: it does not see through deferred annotations.
    checked = ServiceSettings.model_validate(args)
    settings = checked.model_dump(mode="json")
    replicas, api = checked.replicas, checked.api
    summarizer = cast(serve.Deployment, serve.deployment(Summarizer)).options(
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        autoscaling_config={
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "initial_replicas": replicas.first,
            "target_ongoing_requests": replicas.target_ongoing_requests,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
            "downscale_to_zero_delay_s": replicas.downscale_to_zero_delay_s,
            "upscaling_factor": replicas.upscaling_factor,
            "downscaling_factor": replicas.downscaling_factor,
            "look_back_period_s": replicas.look_back_period_s,
            "aggregation_function": replicas.aggregation_function,
            **_policy(replicas),
        },
        max_ongoing_requests=replicas.max_ongoing_requests,
        max_queued_requests=replicas.max_queued_requests,
        graceful_shutdown_timeout_s=replicas.graceful_shutdown_timeout_s,
        health_check_period_s=replicas.health_check_period_s,
        health_check_timeout_s=replicas.health_check_timeout_s,
    )
    ingress = cast(serve.Deployment, serve.deployment(Api)).options(
        num_replicas=api.replicas,
        # Not among the arguments: Serve then takes changes without a restart.
        user_config={"rate_limits": settings.pop("rate_limits")},
        ray_actor_options={"num_cpus": api.num_cpus},
        max_ongoing_requests=api.max_ongoing_requests,
        graceful_shutdown_timeout_s=replicas.graceful_shutdown_timeout_s,
    )
    return ingress.bind(settings, summarizer.bind(settings))


def _policy(replicas: ReplicaSettings) -> dict[str, Any]:
    if replicas.signal == "requests":
        return {}
    kwargs = {"target_drain_s": replicas.target_drain_s}
    return {"policy": {"policy_function": scaling.PATH, "policy_kwargs": kwargs}}
