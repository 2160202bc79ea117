"""A live service to hold a simulation against: started here, or one that runs already."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve_app.cli.errors import CliError, settings_message

if TYPE_CHECKING:
    from serve_app.config import ServiceSettings
    from serve_app.tuning.dashboard import Dashboard
    from serve_app.tuning.model import Platform, Scaling
    from serve_app.tuning.send import Target

_HOST = "127.0.0.1"
_GRACE_S = 10.0  # after a request's deadline


@dataclass(frozen=True)
class Live:
    """A service that can be asked; without a dashboard its replicas are not seen."""

    target: Target
    dashboard: Dashboard | None


def _settings(options: dict[str, Any], scaling: Scaling, platform: Platform) -> ServiceSettings:
    """Settings of a service to start here."""
    from pydantic import ValidationError

    from serve_app.config import ServiceSettings

    try:
        return ServiceSettings.model_validate(
            {
                "model": {"name": options["checkpoint"], "dtype": options["dtype"]},
                # Nothing looked up: a step is then a token, as in the simulation.
                "engine": {
                    "threads": options["threads"],
                    "max_batch_size": options["rows"],
                    "speculation": False,
                },
                "replicas": _replicas(options, scaling, platform),
                "limits": {
                    "default_timeout_s": platform.deadline_s,
                    "timeout_s": max(platform.deadline_s, 300),
                },
                "log": {"level": "WARNING"},
                "usage": {"enabled": False},
            }
        )
    except ValidationError as error:
        raise CliError(settings_message(error)) from None


def _replicas(options: dict[str, Any], scaling: Scaling, platform: Platform) -> dict[str, Any]:
    names = (
        *("target_ongoing_requests", "upscale_delay_s", "downscale_delay_s"),
        *("downscale_to_zero_delay_s", "upscaling_factor", "downscaling_factor"),
        *("look_back_period_s", "aggregation_function", "signal", "target_drain_s"),
    )
    return {
        "min": scaling.min_replicas,
        "max": scaling.max_replicas,
        "initial": scaling.first_replicas,
        "num_cpus": options["threads"],
        "max_ongoing_requests": platform.max_ongoing_requests,
        "max_queued_requests": platform.max_queued_requests,
        **{name: getattr(scaling, name) for name in names},
    }


@contextmanager
def served(options: dict[str, Any], scaling: Scaling, platform: Platform) -> Iterator[Live]:
    """The service of `--url`, or one started here that has these settings and then ends.

    Raises:
        CliError: it did not start, or a setting breaks a rule.
    """
    from serve_app.cli.ray_token import ray_token
    from serve_app.tuning.dashboard import Dashboard
    from serve_app.tuning.send import Target

    def target(url: str, headers: dict[str, str], *, local: bool) -> Target:
        said = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        return Target(
            f"{url.rstrip('/')}/v1/summarize", said, platform.deadline_s + _GRACE_S, 10_000,
            trust_env=not local,
        )  # fmt: skip

    if options["url"] is not None:
        from serve_app.cli.bench import api_token, checked_url

        local = checked_url(options["url"])
        token = api_token(options["token_file"], local=local)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        dashboard = None
        if options["dashboard"] is not None:
            dashboard = Dashboard(options["dashboard"], ray_token(options["ray_token_file"]))
        yield Live(target(options["url"], headers, local=local), dashboard)
        return
    from serve_app.cli.service import running

    settings = _settings(options, scaling, platform)
    with running(settings, _HOST, _free_port()) as (access, ray):
        dashboard = Dashboard(ray.dashboard, ray_token(None))
        yield Live(target(access.url, access.headers, local=True), dashboard)


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def agree(scaling: Scaling, platform: Platform, config: dict[str, Any]) -> None:
    """See that a service has the settings that are simulated.

    Args:
        config: its options, as a Serve config has them.

    Raises:
        CliError: it has not.
    """
    from serve_app.scaling import PATH

    has = {**(config.get("autoscaling_config") or {}), **config}
    if (policy := has.get("policy")) is not None:
        has["signal"] = "tokens" if policy.get("policy_function") == PATH else "requests"
        has |= policy.get("policy_kwargs") or {}
    wanted = {**scaling.model_dump(), "max_ongoing_requests": platform.max_ongoing_requests}
    for name, value in wanted.items():
        if value is None or has.get(name) is None:
            continue
        same = (
            math.isclose(value, has[name])
            if isinstance(value, int | float) and isinstance(has[name], int | float)
            else str(value) == str(has[name])
        )
        if not same:
            raise CliError(
                f"{name}: the service has {has[name]}, to be simulated is {value}: give --values "
                "or --set what it has"
            )
