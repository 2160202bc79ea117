"""`t5-serve tokens`: create, rotate, list, revoke and prune API tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.cli.errors import CliError

if TYPE_CHECKING:
    from serve_app.tokens import TokenRecord

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class _Lifetime(click.ParamType[timedelta]):
    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        if isinstance(value, timedelta):
            return value
        match = re.fullmatch(r"(\d{1,9})([smhdw])", str(value))
        if match is None:
            self.fail(f"{value!r} is not a number with one of s, m, h, d, w after it", param, ctx)
        try:
            lifetime = timedelta(**{_UNITS[match[2]]: int(match[1])})
        except OverflowError:
            self.fail(f"{value!r} is too long", param, ctx)
        if not lifetime:
            self.fail("must be above 0", param, ctx)
        return lifetime


_OPTIONS = [
    click.option(
        "--file",
        "path",
        type=click.Path(dir_okay=False, path_type=Path),
        help="The tokens file. Default: $T5_SERVE_TOKENS_FILE, or tokens.json in "
        "$XDG_CONFIG_HOME/t5-serve (~/.config/t5-serve).",
    ),
    click.option(
        "--secret",
        metavar="NAMESPACE/NAME",
        help="A Kubernetes Secret instead of a file, as the Helm chart names it.",
    ),
    click.option("--kube-context", help="Context of the kubeconfig. Default: the current one."),
    click.option(
        "--secret-type",
        type=click.Choice(["nginx.org/apikey", "Opaque"]),
        default="nginx.org/apikey",
        show_default=True,
        help="Type of a Secret that does not exist yet: for NGINX, or for the service itself.",
    ),
]
_expires = click.option(
    "--expires", type=_Lifetime(), help="Lifetime: 30m, 12h, 90d, 52w. Default: never."
)


@dataclass(frozen=True)
class _Store:
    """Where the tokens are: the functions of a file, or of a Secret."""

    create: Callable[[str, timedelta | None], tuple[TokenRecord, str]]
    rotate: Callable[[str, timedelta, timedelta | None], tuple[TokenRecord, str]]
    list_records: Callable[[], list[TokenRecord]]
    revoke: Callable[[str], int]
    prune: Callable[[], int]


def _with_store(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say where tokens are, and the store itself."""

    @wraps(function)
    def wrapper(
        path: Path | None,
        secret: str | None,
        kube_context: str | None,
        secret_type: str,
        **arguments: Any,
    ) -> None:
        with _told():
            function(_store(path, secret, kube_context, secret_type), **arguments)

    for option in reversed(_OPTIONS):
        wrapper = option(wrapper)
    return wrapper


def _store(
    path: Path | None, secret: str | None, kube_context: str | None, secret_type: str
) -> _Store:
    if secret is None:
        from serve_app import tokens

        file = path or tokens.default_tokens_file()
        return _Store(
            partial(tokens.create, file),
            partial(tokens.rotate, file),
            partial(tokens.list_records, file),
            partial(tokens.revoke, file),
            partial(tokens.prune, file),
        )
    if path is not None:
        raise CliError("--file and --secret: give only one of them")
    namespace, _, name = secret.partition("/")
    if not namespace or not name or "/" in name:
        raise CliError(f"--secret: must be NAMESPACE/NAME, is {secret!r}")
    from serve_app.secret_tokens import SecretTokens

    kept = SecretTokens(namespace, name, kube_context, secret_type)
    return _Store(kept.create, kept.rotate, kept.list_records, kept.revoke, kept.prune)


@click.group("tokens")
def command() -> None:
    """Create, rotate, list and revoke the tokens that let clients in.

    The tokens file holds SHA-256 digests only. A running service follows its changes at once. On
    Kubernetes the tokens are in a Secret: for NGINX, which checks them there, as they are; for the
    service itself as digests.

    \b
    Examples:
      t5-serve tokens create web-shop --expires 90d
      TOKEN=$(t5-serve tokens create nightly-job)
      t5-serve tokens rotate web-shop --overlap 7d --secret prod/t5-summarizer-api-keys
      t5-serve tokens list
      t5-serve tokens revoke web-shop
    """


@command.command("create")
@click.argument("client")
@_expires
@_with_store
def create(store: _Store, client: str, expires: timedelta | None) -> None:
    """Make a token for CLIENT and print it: only now, only its digest is kept.

    CLIENT is a name of 1 to 64 of A-Z a-z 0-9 - . _ and appears in the service's log. A client may
    have several tokens, so that one can be replaced before it is revoked.

    \b
    Example:
      t5-serve tokens create web-shop --expires 90d
    """
    _show(*store.create(client, expires))


@command.command("rotate")
@click.argument("client")
@click.option(
    "--overlap",
    type=_Lifetime(),
    default="7d",
    show_default=True,
    help="How long the tokens that CLIENT has stay good.",
)
@_expires
@_with_store
def rotate(store: _Store, client: str, overlap: timedelta, expires: timedelta | None) -> None:
    """Make a new token for CLIENT and let its others expire after an overlap.

    \b
    Example:
      t5-serve tokens rotate web-shop --overlap 24h
    """
    _show(*store.rotate(client, overlap, expires))


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="A JSON array instead of a table.")
@_with_store
def list_(store: _Store, as_json: bool) -> None:
    """List the tokens: id, client, created, expires. Expired ones are marked.

    \b
    Example:
      t5-serve tokens list --json | jq -r '.[] | select(.expired).id'
    """
    records = store.list_records()
    now = datetime.now(UTC)
    if as_json:
        rows = [
            {
                **record.model_dump(mode="json", exclude={"sha256"}),
                "expired": not record.live(now),
            }
            for record in records
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    width = max([6, *(len(record.client) for record in records)])
    click.echo(f"{'ID':8}  {'CLIENT':{width}}  {'CREATED':20}  EXPIRES")
    for record in records:
        expires = "never" if record.expires is None else _time(record.expires)
        note = "" if record.live(now) else "  (expired)"
        click.echo(
            f"{record.id:8}  {record.client:{width}}  {_time(record.created)}  {expires}{note}"
        )


@command.command("revoke")
@click.argument("client_or_id", metavar="CLIENT|ID")
@_with_store
def revoke(store: _Store, client_or_id: str) -> None:
    """Remove all tokens of a client, or the one token with an id.

    \b
    Examples:
      t5-serve tokens revoke web-shop
      t5-serve tokens revoke 1f0c2d9a
    """
    count = store.revoke(client_or_id)
    if not count:
        raise CliError(f"no token has the client or id {client_or_id!r}")
    click.echo(f"revoked {count} token{'' if count == 1 else 's'}")


@command.command("prune")
@_with_store
def prune(store: _Store) -> None:
    """Remove the tokens that have expired.

    The service lets no expired token in, pruned or not. NGINX knows no expiry: there a token is
    good until it is removed, which the Helm chart does every few minutes.

    \b
    Example:
      t5-serve tokens prune --secret prod/t5-summarizer-api-keys
    """
    count = store.prune()
    click.echo(f"removed {count} expired token{'' if count == 1 else 's'}")


def _show(record: TokenRecord, token: str) -> None:
    click.echo(token)
    until = "never expires" if record.expires is None else f"expires {_time(record.expires)}"
    click.echo(f"token {record.id} of {record.client}, {until}; shown once, not kept", err=True)


@contextmanager
def _told() -> Iterator[None]:
    from serve_app.tokens import TokenFileError

    try:
        yield
    except TokenFileError as error:
        raise CliError(str(error)) from None


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
