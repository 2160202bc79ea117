"""`t5-serve tokens`: create, list and revoke API tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from serve_app.cli.errors import CliError

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


_file = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The tokens file. Default: $T5_SERVE_TOKENS_FILE, or tokens.json in "
    "$XDG_CONFIG_HOME/t5-serve (~/.config/t5-serve).",
)


@click.group("tokens")
def command() -> None:
    """Create, list and revoke the tokens that let clients in.

    The tokens file holds SHA-256 digests only. A running service follows its changes at once.

    \b
    Examples:
      t5-serve tokens create web-shop --expires 90d
      TOKEN=$(t5-serve tokens create nightly-job)
      t5-serve tokens list
      t5-serve tokens revoke web-shop
    """


@command.command("create")
@click.argument("client")
@click.option("--expires", type=_Lifetime(), help="Lifetime: 30m, 12h, 90d, 52w. Default: never.")
@_file
def create(client: str, expires: timedelta | None, path: Path | None) -> None:
    """Make a token for CLIENT and print it: only now, only its digest is kept.

    CLIENT is a name of 1 to 64 of A-Z a-z 0-9 - . _ and appears in the service's log. A client may
    have several tokens, so that one can be replaced before it is revoked.

    \b
    Example:
      t5-serve tokens create web-shop --expires 90d
    """
    from serve_app import tokens

    with _told():
        record, token = tokens.create(path or tokens.default_tokens_file(), client, expires)
    click.echo(token)
    until = "never expires" if record.expires is None else f"expires {_time(record.expires)}"
    click.echo(f"token {record.id} of {client}, {until}; shown once, not kept", err=True)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="A JSON array instead of a table.")
@_file
def list_(as_json: bool, path: Path | None) -> None:
    """List the tokens: id, client, created, expires. Expired ones are marked.

    \b
    Example:
      t5-serve tokens list --json | jq -r '.[] | select(.expired).id'
    """
    from serve_app import tokens

    with _told():
        records = tokens.list_records(path or tokens.default_tokens_file())
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
@_file
def revoke(client_or_id: str, path: Path | None) -> None:
    """Remove all tokens of a client, or the one token with an id.

    \b
    Examples:
      t5-serve tokens revoke web-shop
      t5-serve tokens revoke 1f0c2d9a
    """
    from serve_app import tokens

    with _told():
        count = tokens.revoke(path or tokens.default_tokens_file(), client_or_id)
    if not count:
        raise CliError(f"no token has the client or id {client_or_id!r}")
    click.echo(f"revoked {count} token{'' if count == 1 else 's'}")


@contextmanager
def _told() -> Iterator[None]:
    from serve_app.tokens import TokenFileError

    try:
        yield
    except TokenFileError as error:
        raise CliError(str(error)) from None


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
