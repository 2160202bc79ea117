"""What a plan is made of, how it is printed as a shell script, and how it is run.

A plan is a list of steps and values. A step looks at one resource, makes it when it is not there,
and changes it when it is not as wanted. A value is read from what is there, and stands as `$NAME`
in the commands after it. The script that is printed and the run use the same commands.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

# Commands run from here, so that they can be printed with short paths.
ROOT = Path(__file__).resolve().parents[2]

# gcloud and bq have no exit code of their own for it.
_NOT_FOUND = re.compile(r"not[ _]found|does not exist|HTTPError 404|code=404", re.IGNORECASE)
_VALUE = re.compile(r"\$([A-Z_]+)")
_WIDTH = 90

Values = dict[str, str]


class StepError(Exception):
    """Why a step could not be done."""


@dataclass(frozen=True)
class Command:
    """A command line, and what it reads from its standard input."""

    argv: tuple[str, ...]
    stdin: str = ""

    def script(self, indent: str = "") -> str:
        """As a shell writes it; a long command has each of its flags on a line."""
        words = [_quote(word) for word in self.argv]
        text = " ".join(words)
        if len(text) > _WIDTH:
            fold = f" \\\n{indent}    "
            text = "".join((fold if word.startswith("--") else " ") + word for word in words)[1:]
        if self.stdin:
            text += f" <<'END'\n{self.stdin}\nEND"
        return text


@dataclass(frozen=True)
class Value:
    """Something Google decides: `$name` in the commands that come after it."""

    name: str
    read: Command


@dataclass(frozen=True)
class Step:
    """One resource.

    Attributes:
        title: what it is.
        look: shows it; a "not found" means that it is to be made.
        make: makes it. None for what is always there, such as an IAM policy.
        change: brings it to what is wanted. None for what only `make` decides.
        as_wanted: whether what `look` printed needs no change. It may raise `StepError`.
    """

    title: str
    look: Command
    make: Command | None = None
    change: Command | None = None
    as_wanted: Callable[[str, Values], bool] = lambda shown, values: True


Plan = Sequence[Step | Value]


def script(plan: Plan) -> str:
    """The plan as a shell script, to be read: it changes always what `run` changes if need be."""
    lines = ["set -euo pipefail", "export CLOUDSDK_CORE_DISABLE_PROMPTS=1"]
    for where, item in _numbered(plan):
        lines.append("")
        if isinstance(item, Value):
            lines.append(f"{item.name}=$({item.read.script()})")
            continue
        lines.append(f"# {where} {item.title}")
        if item.make is None:
            assert item.change is not None, item.title
            lines.append(item.change.script())
            continue
        lines.append(f"if ! {item.look.script()} >/dev/null 2>&1; then")
        lines.append("    " + item.make.script("    "))
        if item.change is not None:
            lines += ["else", "    " + item.change.script("    ")]
        lines.append("fi")
    return "\n".join(lines) + "\n"


def run(plan: Plan, out: TextIO) -> Values:
    """Do what is not done yet, and return the values. `StepError` at the first failure."""
    values: Values = {}
    for where, item in _numbered(plan):
        try:
            if isinstance(item, Value):
                shown = _ask(item.read, values)
                if not shown:
                    raise StepError("there is none")
                values[item.name] = shown
                continue
            print(f"[{where}] {item.title} …", file=out, flush=True)
            print(f"        {_do(item, values)}", file=out, flush=True)
        except StepError as error:
            title = item.name if isinstance(item, Value) else item.title
            raise StepError(f"step {where}, {title}: {error}") from None
    return values


def expand(text: str, values: Values) -> str:
    """`text` with its `$NAME`s replaced."""
    return _VALUE.sub(lambda match: values[match[1]], text)


def _numbered(plan: Plan) -> list[tuple[str, Step | Value]]:
    steps = sum(isinstance(item, Step) for item in plan)
    numbered = []
    number = 0
    for item in plan:
        number += isinstance(item, Step)
        numbered.append((f"{number}/{steps}", item))
    return numbered


def _do(step: Step, values: Values) -> str:
    shown = _ask(step.look, values)
    if shown is None:
        if step.make is None:
            raise StepError(f"not found: {step.look.script()}")
        _act(step.make, values)
        return "made"
    if step.as_wanted(shown, values):
        return "is there"
    if step.change is None:
        raise StepError("is there, but not as wanted, and cannot be changed")
    _act(step.change, values)
    return "changed"


def _ask(command: Command, values: Values) -> str | None:
    """What a reading command prints; None when what it asks for does not exist."""
    done = _call(command, values, capture_errors=True)
    if done.returncode == 0:
        return done.stdout.strip()
    said = f"{done.stdout}\n{done.stderr}".strip()
    if _NOT_FOUND.search(said):
        return None
    raise StepError(f"{command.script()}\n{said}")


def _act(command: Command, values: Values) -> None:
    # What gcloud says about its progress, and about an error, goes through as it comes.
    done = _call(command, values, capture_errors=False)
    if done.returncode != 0:
        raise StepError(
            f"this ended with {done.returncode}:\n{command.script()}\n{done.stdout}".strip()
        )


def _call(
    command: Command, values: Values, *, capture_errors: bool
) -> subprocess.CompletedProcess[str]:
    argv = [expand(word, values) for word in command.argv]
    try:
        return subprocess.run(  # noqa: S603
            argv,
            input=command.stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if capture_errors else None,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
        )
    except OSError as error:
        raise StepError(f"{argv[0]}: {error.strerror}") from None


def _quote(word: str) -> str:
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("--"):
        return flag + equals + _quote(value)
    if _VALUE.search(word) or ("'" in word and not re.search(r'[\\"`$!]', word)):
        return '"' + re.sub(r'([\\"`])', r"\\\1", word) + '"'
    return shlex.quote(word)
