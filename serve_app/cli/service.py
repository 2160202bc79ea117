"""A local Ray with the service on it: start, check with one summary, tell, wait, stop."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx
import psutil

from serve_app.cli.errors import CliError
from serve_app.cli.processes import Signals, no_process_left
from serve_app.config import ServiceSettings
from serve_app.tokens import TokenFileError, default_tokens_file, dev_token

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

_EXAMPLE = (
    "This package provides a small and fast HTTP server. It serves static files, lists folders, "
    "and can be configured with a single file. Access can be limited with passwords."
)
_STATUS_S = 0.25  # a status takes CPU time that the replicas need to start, on a small machine
_RETRY_S = 0.1
_READY_S = 600.0  # a large model takes minutes to load from a slow disk
_CHECK_S = 120.0
_CLIENT = "t5-serve-run"

_RAY_ENVIRONMENT = {
    # Ray runs whatever code whoever reaches its ports sends it, and Serve's replicas take calls on
    # all interfaces: Ray's own token (~/.ray/auth_token, made on first use) is what keeps others
    # out. It is Ray's default for a local cluster; said here because Ray warns otherwise.
    "RAY_AUTH_MODE": "token",
    # In spite of its name: 0 makes 127.0.0.1 this node's address, as on macOS. All other servers
    # of Ray then listen on loopback only, and a change of networks does not cut Ray off itself.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # On this terminal: the service's own JSON lines, whole. Serve's go to the session's folder.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # A replica's own code has no event loop and thread of its own beside Serve's: each has to wait
    # for Python's lock, which an engine's thread holds most of the time.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
}


@dataclass(frozen=True)
class Access:
    """How to call the service."""

    url: str
    token: str | None
    headers: dict[str, str]


@dataclass(frozen=True)
class LocalRay:
    """Ray as it was started here."""

    dashboard: str
    logs: Path


def run(settings: ServiceSettings, host: str, port: int, *, once: bool) -> None:
    """Run the service until a signal, or, with `once`, until its first summary.

    Raises:
        CliError: it did not start, or Ray died under it.
    """
    try:
        with running(settings, host, port) as (access, local):
            started = time.time() - psutil.Process().create_time()
            _tell(access, local, started)
            if not once:
                _wait(local)
    except KeyboardInterrupt:
        return


@contextlib.contextmanager
def running(settings: ServiceSettings, host: str, port: int) -> Iterator[tuple[Access, LocalRay]]:
    """A Ray of this process' own with the service on it, which has given a summary.

    In the end all child processes of this process are gone. SIGINT and SIGTERM are
    `KeyboardInterrupt` meanwhile.

    Raises:
        CliError: it did not start.
    """
    access = _access(settings, host, port)
    set_ray_environment()
    signals = Signals()
    signals.install()
    with no_process_left(signals, _stop):
        local = _start_ray(settings, signals)
        _deploy(settings, host, port, local)
        _check(access, local)
        yield access, local


def set_ray_environment() -> None:
    """What a Ray started here takes from the environment, some of it when it is imported."""
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _access(settings: ServiceSettings, host: str, port: int) -> Access:
    # Nobody can call a wildcard address.
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    if settings.auth.mode == "off":
        return Access(url, None, {})
    if settings.auth.mode == "trusted-header":
        return Access(url, None, {settings.auth.header: _CLIENT})
    try:
        token = dev_token(settings.auth.tokens_file or default_tokens_file())
    except TokenFileError as error:
        raise CliError(str(error)) from None
    return Access(url, token, {"Authorization": f"Bearer {token}"})


def _start_ray(settings: ServiceSettings, signals: Signals) -> LocalRay:
    import ray

    # Ray's start is mostly waiting for its processes: read the code of Serve meanwhile.
    imports = threading.Thread(target=importlib.import_module, args=("serve_app.app",), daemon=True)
    imports.start()
    try:
        # "local": never join a cluster that happens to run.
        context: Any = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            logging_level=logging.ERROR,
        )
    except SystemExit as error:
        # Ray's own SIGTERM handler exits with the signal's number.
        if error.code == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise CliError(f"Ray did not start: it exited with {error.code}") from None
    except Exception as error:
        raise CliError(f"Ray did not start: {error}") from None
    signals.install()
    imports.join()
    _check_room(settings, ray.cluster_resources())
    logs = Path(context.address_info["session_dir"]) / "logs"
    return LocalRay(f"http://{context.dashboard_url}", logs)


def _check_room(settings: ServiceSettings, resources: dict[str, float]) -> None:
    """Refuse what Ray would wait for forever."""
    replicas, api = settings.replicas, settings.api
    first = replicas.first
    for name, needed in (
        ("CPU", first * replicas.num_cpus + api.replicas * api.num_cpus),
        ("GPU", first * replicas.num_gpus),
    ):
        had = resources.get(name, 0)
        if needed > had:
            raise CliError(
                f"replicas: {first} of the model need {needed:g} {name}s, this machine has {had:g}"
            )


def _deploy(settings: ServiceSettings, host: str, port: int, local: LocalRay) -> None:
    """Start Serve and the service on it. Returns once all replicas are up."""
    from ray import serve

    from serve_app.app import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config={"encoding": "JSON"},  # in the session's folder
    )
    # Not serve.run(), which looks only once a second whether the application runs.
    serve.run_many(
        [serve.RunTarget(build(settings))],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        application = serve.status().applications.get("default")
        if application is not None and application.status == "RUNNING":
            return
        if application is not None and application.status == "DEPLOY_FAILED":
            raise CliError(f"the service did not start: {_reason(application)}; logs: {local.logs}")
        time.sleep(_STATUS_S)
    raise CliError(f"the service was not ready after {_READY_S:g} s; logs: {local.logs}")


def _reason(application: ApplicationStatusOverview) -> str:
    """The last exception of the traceback in which Serve reports a replica that failed."""
    for deployment in application.deployments.values():
        lines = [line.strip() for line in deployment.message.splitlines()]
        if errors := [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]:
            return errors[-1]
    return application.message


def _check(access: Access, local: LocalRay) -> None:
    """Make one summary, as any client would."""
    deadline = time.monotonic() + _CHECK_S
    said = ""
    # The proxy of this machine itself: no proxy set in the environment is asked.
    with httpx.Client(headers=access.headers, timeout=_CHECK_S, trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                response = client.post(f"{access.url}/v1/summarize", json={"text": _EXAMPLE})
            except httpx.TransportError as error:
                said = str(error)
            else:
                if response.is_success:
                    return
                said = f"HTTP status {response.status_code}: {response.text}"
                # Serve's proxy says so until it has the route.
                if response.status_code not in (404, 503):
                    break
            time.sleep(_RETRY_S)
    raise CliError(f"the service started but gave no summary: {said}; logs: {local.logs}")


def _tell(access: Access, local: LocalRay, started: float) -> None:
    header = "".join(
        f" -H {shlex.quote(f'{name}: {value}')}" for name, value in access.headers.items()
    )
    page = f"{access.url}/#token={access.token}" if access.token else f"{access.url}/"
    lines = [
        f"Service    {access.url}",
        f"Page       {page}",
        f"API docs   {access.url}/docs",
        f"Dashboard  {local.dashboard}  (Ray's; its token: ray get-auth-token)",
    ]
    if access.token:
        lines.append(f"Token      {access.token}")
    lines += [
        "",
        f"curl -sS {access.url}/v1/summarize{header} -H 'Content-Type: text/plain' "
        f"--data-binary {shlex.quote(_EXAMPLE)}",
        "",
        f"first summary {started:.1f} s after start",
    ]
    click.echo("\n".join(lines))
    sys.stdout.flush()


def _wait(local: LocalRay) -> None:
    """Until a signal comes; fails when Ray has died."""
    core = [
        process
        for process in psutil.Process().children()
        if process.name() in ("gcs_server", "raylet")
    ]
    while all(process.is_running() and process.status() != "zombie" for process in core):
        time.sleep(1)
    raise CliError(f"Ray has stopped by itself; logs: {local.logs}")


def _stop() -> None:
    ray, serve = sys.modules.get("ray"), sys.modules.get("ray.serve")
    if ray is None or not ray.is_initialized():
        return
    # Ray forwards complaints of its own about the controller it has been told to stop.
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            # It fails when Ray is half dead already; what is left is ended all the same.
            with contextlib.suppress(Exception):
                if serve is not None:
                    serve.shutdown()
        finally:
            ray.shutdown()
    for line in said.getvalue().splitlines():
        if line.startswith("{"):
            click.echo(line, err=True)
