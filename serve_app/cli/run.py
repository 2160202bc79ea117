"""`t5-serve run`: the whole service on this machine, for as long as the command runs."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.cli.errors import CliError, settings_message

if TYPE_CHECKING:
    from serve_app.config import ServiceSettings


@click.command("run")
@click.option("--model", help="`demo` (bundled, the default), a folder, or a hub repository.")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--engine", help="`continuous` (our own, the default) or `transformers`.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--replicas", metavar="N|MIN:MAX", help="Replicas of the model, or their range. Default: 1."
)
@click.option(
    "--auth",
    type=click.Choice(["token", "trusted-header", "off"]),
    help="Who may call: holders of a token (the default), whoever a trusted ingress names in a "
    "header, or anybody.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file of settings; the options above win over it.",
)
@click.option("--once", is_flag=True, help="Stop after the first summary: to check, or to time.")
def command(
    model: str | None,
    revision: str | None,
    engine: str | None,
    host: str,
    port: int,
    replicas: str | None,
    auth: str | None,
    config_file: Path | None,
    once: bool,
) -> None:
    """Start the service on this machine and keep it running until Ctrl-C.

    Starts a Ray of its own (Ray clusters that already run are left alone), deploys the service,
    makes one summary to check it, and prints its addresses, a token and a `curl` line to try.
    Ray's own ports are open to this machine only. RAY_TMPDIR moves Ray's session folder and logs.

    \b
    Examples:
      t5-serve run
      t5-serve run --model google-t5/t5-small --replicas 1:4
      t5-serve run --model ./my-t5 --host 0.0.0.0 --port 9000
      t5-serve run --config settings.yaml --once

    \b
    A settings file; every key may be left out:
      model: {name: google-t5/t5-small, dtype: auto}
      replicas: {min: 1, max: 4, num_cpus: 2}
      limits: {input_tokens: 50000}
      auth: {mode: token, tokens_file: /etc/t5-serve/tokens.json}
    """
    settings = _settings(config_file, model, revision, engine, replicas, auth)
    if settings.auth.mode != "token" and not _is_loopback(host):
        _warn_open(settings.auth.mode, host, port)
    _check_model(settings)
    _check_port(host, port)
    from serve_app.cli.service import run

    run(settings, host, port, once=once)


def _settings(
    config_file: Path | None,
    model: str | None,
    revision: str | None,
    engine: str | None,
    replicas: str | None,
    auth: str | None,
) -> ServiceSettings:
    from pydantic import ValidationError

    from serve_app.config import ServiceSettings

    tree = {} if config_file is None else _read(config_file)
    try:
        if model is not None:
            # The file's revision is of the file's model.
            _section(tree, "model", "name").update(name=model, revision=None)
        if revision is not None:
            _section(tree, "model", "name").update(revision=revision)
        if engine is not None:
            _section(tree, "engine", "kind").update(kind=engine)
        if auth is not None:
            _section(tree, "auth", "mode").update(mode=auth)
        if replicas is not None:
            span = ServiceSettings.model_validate({"replicas": replicas}).replicas
            given = tree.get("replicas")
            kept = given if isinstance(given, dict) else {}
            tree["replicas"] = {**kept, "min": span.min, "max": span.max}
        return ServiceSettings.model_validate(tree)
    except ValidationError as error:
        raise CliError(settings_message(error)) from None


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CliError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise CliError(f"{path}: not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise CliError(f"{path}: must be a mapping of settings")
    return tree


def _section(tree: dict[str, Any], name: str, short: str) -> dict[str, Any]:
    """A section to change; a plain string stands for its main key, as in `ServiceSettings`."""
    given = tree.get(name)
    if given is not None and not isinstance(given, dict | str):
        return {}  # not a section at all: left as it is for validation to tell
    section = {short: given} if isinstance(given, str) else dict(given or {})
    tree[name] = section
    return section


def _check_model(settings: ServiceSettings) -> None:
    from serve_app.engine.checkpoint import CheckpointError, resolve

    try:
        # Also downloads it: replicas then find it in the cache, each within its start timeout.
        resolve(settings.model.name, settings.model.revision)
    except CheckpointError as error:
        raise CliError(str(error)) from None


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the HTTP server does: a port in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise CliError(f"--host {host}: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CliError(f"port {port} on {host} is in use; --port takes another") from None
        raise CliError(f"cannot listen on {host} port {port}: {error.strerror}") from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _warn_open(mode: str, host: str, port: int) -> None:
    who = (
        "everybody who can reach it may use it (--auth off)"
        if mode == "off"
        else "everybody who can reach it may name themselves (--auth trusted-header)"
    )
    click.echo(f"t5-serve: warning: listening on {host} port {port}: {who}", err=True)
