"""`t5-serve limits`: limits of requests and tokens, from what clients did."""

from __future__ import annotations

import re
from datetime import datetime

import click

from serve_app.cli.errors import CliError
from serve_app.cli.usage import log_options, open_usage

_CLIENT = re.compile(r"[-._A-Za-z0-9]{1,64}")


@click.group("limits")
def command() -> None:
    """Rate limits: of requests, at the ingress, and of tokens, in the service.

    \b
    Example:
      t5-serve limits suggest --since 7d > limits.yaml
    """


def _suggest(
    logs: tuple[str, ...], since: datetime | None, until: datetime | None, headroom: float
) -> None:
    from serve_app.usage.limits import values

    usage, _ = open_usage(logs, since, until)
    # Lines are input: a name that no token can have does not get into the chart's values.
    arrivals = {name: calls for name, calls in usage.arrivals().items() if _CLIENT.fullmatch(name)}
    work = {name: calls for name, calls in usage.work().items() if name in arrivals}
    try:
        click.echo(values(arrivals, work, headroom), nl=False)
    except ValueError as error:
        raise CliError(str(error)) from None


command.add_command(
    click.Command(
        "suggest",
        callback=_suggest,
        params=[
            *log_options(),
            click.Option(
                ["--headroom"],
                type=click.FloatRange(1, 100),
                default=1.5,
                show_default=True,
                help="Room above what clients did: 1 is none, 2 twice as much.",
            ),
        ],
        help="""Print values for the chart: limits with which each client's calls would have passed.

Calls that were refused for their rate count, too: read what is suggested before you use it.

\b
Example:
  t5-serve limits suggest --since 7d > limits.yaml
  helm upgrade t5-summarizer helm/t5-summarizer -n t5 --reuse-values -f limits.yaml
""",
    )
)
