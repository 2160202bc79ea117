"""Expected errors of the command line: one line on stderr, exit status 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pydantic import ValidationError


class CliError(click.ClickException):
    """Something the user can set right; `serve_app.cli.main` prints it as one line."""

    exit_code = 2


def one_line(text: str) -> str:
    """`text` with every run of white space, line breaks too, as one space."""
    return " ".join(text.split())


def settings_message(error: ValidationError) -> str:
    """What is wrong with settings: field, limit and value of every broken rule."""
    from serve_app.errors import shorten

    said = []
    for detail in error.errors(include_url=False):
        field = ".".join(map(str, detail["loc"])) or "settings"
        if detail["type"] == "extra_forbidden":
            said.append(f"{field}: unknown setting")
            continue
        message = detail["msg"].removeprefix("Value error, ")
        value = detail["input"]
        shown = "" if isinstance(value, dict) else f", is {shorten(value)!r}"
        said.append(f"{field}: {message}{shown}")
    return "; ".join(said)
