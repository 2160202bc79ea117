"""`t5-serve usage`: who calls, how often, how well, at what cost; and what ships the events."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.cli.errors import CliError, one_line

if TYPE_CHECKING:
    from serve_app.usage.cloud import CloudLogging
    from serve_app.usage.reader import Line, Tally
    from serve_app.usage.views import Usage

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class _Moment(click.ParamType[datetime]):
    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            if match := re.fullmatch(r"(\d{1,6})([mhdw])", str(value)):
                return datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
            moment = datetime.fromisoformat(str(value))
            return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(
                f"{value!r} is neither a date (2026-11-23), nor a time (2026-11-23T14:00), nor "
                "an age (90m, 24h, 7d)",
                param,
                ctx,
            )


class _Group(click.Group):
    """Without a subcommand: the overview."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = ctx.help_option_names
        if not args or (args[0].startswith("-") and args[0] not in own):
            args = ["overview", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        from serve_app.usage.views import REPORTS

        return [*(_spelled(name) for name in REPORTS), "sql", "tail"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from serve_app.usage.views import REPORTS

        for name in REPORTS:
            if cmd_name == _spelled(name):
                return _report_command(name)
        return super().get_command(ctx, cmd_name)


def _spelled(name: str) -> str:
    return name.replace("_", "-")


@click.group("usage", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Report on the requests in local logs: usage events, and NGINX's access log.

    The reports are the project's BigQuery views, run by DuckDB. Without a name: the overview.

    \b
    Examples:
      t5-serve usage
      t5-serve usage latency --since 24h
      t5-serve usage calls-per-client-day --client web-shop --json
      t5-serve usage --html report.html
      kubectl logs -l app.kubernetes.io/component=api -c usage --tail=-1 | t5-serve usage --logs -
    """


def _report_command(name: str) -> click.Command:
    from serve_app.usage.views import question

    def run(**options: Any) -> None:
        _report(name, **options)

    return click.Command(
        _spelled(name),
        callback=run,
        params=[*log_options(), *_output_options()],
        help=f"{question(name)}\n\n\b\nExample:\n  t5-serve usage {_spelled(name)} --since 7d",
    )


def log_options() -> list[click.Parameter]:
    """Which lines are read: the parameters of `open_usage`, but for `client`."""
    return [
        click.Option(
            ["--logs"],
            metavar="PATH|-",
            multiple=True,
            help="File or folder of logs, gzip or not; - is stdin. May be given more than once. "
            "Default: $T5_SERVE_USAGE_FOLDER, or t5-serve/usage in $XDG_STATE_HOME "
            "(~/.local/state).",
        ),
        click.Option(
            ["--since"], type=_Moment(), help="From this time on: 2026-11-23, or an age as 24h."
        ),
        click.Option(["--until"], type=_Moment(), help="Before this time."),
    ]


def _output_options() -> list[click.Parameter]:
    return [
        click.Option(["--client"], help="Only this client's requests."),
        click.Option(["--json", "as_json"], is_flag=True, help="The rows as a JSON array."),
        click.Option(
            ["--html"],
            type=click.Path(dir_okay=False, path_type=Path),
            help="Write all reports to this file, as one page with charts.",
        ),
    ]


def _report(
    name: str,
    logs: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
    client: str | None,
    as_json: bool,
    html: Path | None,
) -> None:
    from serve_app.usage.text import plain, table_text
    from serve_app.usage.views import REPORTS

    if as_json and html is not None:
        raise click.UsageError("give --json or --html, not both")
    usage, tally = open_usage(logs, since, until, client)
    if html is not None:
        from serve_app.usage.page import page

        tables = {one: usage.report(one) for one in REPORTS}
        try:
            html.write_text(page(tables, [_told(tally)]), encoding="utf-8")
        except OSError as error:
            raise CliError(f"{html}: {error.strerror}") from None
    elif as_json:
        rows = usage.report(name).records()
        said = [{column: plain(value) for column, value in row.items()} for row in rows]
        click.echo(json.dumps(said, ensure_ascii=False, indent=2))
    else:
        click.echo(table_text(usage.report(name)), nl=False)


def open_usage(
    logs: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
    client: str | None = None,
) -> tuple[Usage, Tally]:
    """The views over the logs that were named, and what reading them met.

    Lines that could not be read are told on stderr.

    Raises:
        CliError: a log cannot be read, or the extra is not installed.
    """
    from serve_app.usage.reader import Tally, UsageReadError
    from serve_app.usage.views import MissingExtraError, Usage

    tally = Tally()
    try:
        usage = Usage(lines_of(logs, tally), since, until, client)
    except (UsageReadError, MissingExtraError) as error:
        raise CliError(str(error)) from None
    if tally.broken_lines:
        click.echo(f"t5-serve: {_told(tally)}: {'; '.join(tally.broken)}", err=True)
    return usage, tally


def _told(tally: Tally) -> str:
    def count(number: int, noun: str) -> str:
        return f"{number:,} {noun}{'' if number == 1 else 's'}"

    told = f"{count(tally.lines, 'line')} of {count(tally.files, 'file')}"
    if tally.broken_lines:
        told += f"; {count(tally.broken_lines, 'line')} could not be read"
    return told


def lines_of(logs: tuple[str, ...], tally: Tally) -> Iterator[Line]:
    """The lines of the logs that were named, or of the default folder.

    Raises:
        UsageReadError: a log cannot be read.
    """
    from serve_app.usage.folder import default_usage_folder
    from serve_app.usage.reader import UsageReadError, read_files, read_stream

    if not logs:
        folder = default_usage_folder()
        if not folder.is_dir():
            raise UsageReadError(
                f"{folder}: there is no usage yet: start the service, or name logs with --logs"
            )
        yield from read_files([folder], tally)
    for path in logs:
        if path == "-":
            with open(sys.stdin.fileno(), "rb", closefd=False) as stdin:
                yield from read_stream(stdin, "stdin", tally)
        else:
            yield from read_files([Path(path)], tally)


@command.command("sql")
@click.option(
    "--dataset",
    default="t5_requests",
    show_default=True,
    help="Where the views go, and Cloud Logging's sink writes: NAME or PROJECT.NAME.",
)
@click.option(
    "--table",
    "tables",
    multiple=True,
    default=("stdout",),
    show_default=True,
    help="Where its lines are: stdout for containers' output, else the log's id with _ for what is "
    "no letter or digit. May be given more than once.",
)
@click.option(
    "--source",
    help="Dataset linked to a log bucket, to read in place of the sink's: NAME or PROJECT.NAME.",
)
def sql(dataset: str, tables: tuple[str, ...], source: str | None) -> None:
    """Print the BigQuery statements that make the views.

    \b
    Examples:
      t5-serve usage sql | bq query --use_legacy_sql=false --project_id=PROJECT
      t5-serve usage sql --source PROJECT.t5_request_logs
    """
    from serve_app.usage.views import BASE, REPORTS, view_sql

    for option, given in (("--dataset", dataset), ("--source", source)):
        named = r"([a-z][-a-z0-9:.]{4,62}\.)?[A-Za-z0-9_]{1,1024}"
        if given is not None and re.fullmatch(named, given) is None:
            raise CliError(f"{option}: must be NAME or PROJECT.NAME, is {given!r}")
    for table in tables:
        if re.fullmatch(r"[A-Za-z0-9_]{1,1024}", table) is None:
            raise CliError(f"--table: must be letters, digits and _, is {table!r}")
    statements = [view_sql(name, dataset, tables, source) for name in (*BASE, *REPORTS)]
    click.echo("\n".join(statements), nl=False)


@command.command("tail")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder of usage events. Default: as for the reports.",
)
@click.option("--follow", is_flag=True, help="Go on until SIGTERM or SIGINT.")
@click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File that remembers how far this got. Default: DESTINATION.checkpoint in the folder.",
)
@click.option(
    "--to",
    "destination",
    type=click.Choice(["stdout", "google-cloud-logging"]),
    default="stdout",
    show_default=True,
    help="Where the events go.",
)
@click.option("--project", help="google-cloud-logging: its project. Default: the credentials'.")
@click.option(
    "--log",
    default="t5-requests",
    show_default=True,
    help="google-cloud-logging: the log's id.",
)
def tail(
    folder: Path | None,
    follow: bool,
    checkpoint: Path | None,
    destination: str,
    project: str | None,
    log: str,
) -> None:
    """Pass on the usage events that have not been passed on yet.

    To stdout is what the chart's sidecar does. To Google's Cloud Logging, with the credentials of
    the environment, is for a service off Kubernetes; it needs the extra `gcp`.

    \b
    Examples:
      t5-serve usage tail --folder /var/log/t5-serve --follow
      t5-serve usage tail --follow --to google-cloud-logging --project my-project
    """
    from serve_app.usage.folder import default_usage_folder
    from serve_app.usage.tail import Tail

    stop = threading.Event()
    if follow:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    folder = folder or default_usage_folder()
    try:
        if destination == "stdout":
            passing = Tail(folder, sys.stdout.buffer, checkpoint)
        else:
            checkpoint = checkpoint or folder / f"{destination}.checkpoint"
            out = _cloud_logging(project, log, stop if follow else None)
            passing = Tail(folder, out, checkpoint)
        if follow:
            passing.follow(stop)
        else:
            passing.drain()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CliError(f"{error.filename or 'tail'}: {error.strerror}") from None


def _cloud_logging(project: str | None, log: str, stop: threading.Event | None) -> CloudLogging:
    from serve_app.usage import cloud

    if re.fullmatch(r"[A-Za-z0-9/_.-]{1,511}", log) is None:
        raise CliError(f"--log: must be 1 to 511 of A-Z a-z 0-9 / _ . -, is {log!r}")

    def say(message: str) -> None:
        click.echo(f"t5-serve: {one_line(message)}", err=True)

    try:
        client, project = cloud.connect(project)
    except cloud.MissingGcpError as error:
        raise CliError(str(error)) from None
    return cloud.CloudLogging(client, project, log.replace("/", "%2F"), stop, say)
