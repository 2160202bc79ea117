"""Run the runner: inside an image by buildah, or in this environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from quality import RUNNER, GateError
from quality.inputs import Rows, Text

_GRACE_S = 10.0  # between asking the runner to end and ending it


class RunnerError(Exception):
    """The model could not be run to the end: the gate has failed. One line."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image: its name as given, its id, and its manifest's digest if buildah knows one."""

    name: str
    id: str
    digest: str


@contextmanager
def container(name: str) -> Iterator[tuple[Image, list[str]]]:
    """A container of the image, and the command that runs what follows inside it.

    `name` is in buildah's store, or has a transport (`oci:FOLDER`). The container is removed in the
    end; an image read from a folder stays in the store.

    Raises:
        GateError: no buildah, or no such image.
    """
    if not shutil.which("buildah"):
        raise GateError("buildah is not here, which runs images (apt-get install buildah)")
    # A name alone is never looked for in a registry: what is judged is what is here.
    local = name.partition(":")[0] in ("oci", "oci-archive", "docker-archive", "dir")
    pull = "missing" if local else "never"
    found = subprocess.run(
        ["buildah", "from", "--quiet", f"--pull={pull}", name], capture_output=True, text=True
    )
    if found.returncode:
        raise GateError(f"image {name!r}: {_last_line(found.stderr) or 'buildah from failed'}")
    made = found.stdout.split()[-1]
    try:
        kind = "{{.FromImageID}} {{.FromImageDigest}}"
        told = subprocess.run(
            ["buildah", "inspect", "--type", "container", "--format", kind, made],
            capture_output=True,
            text=True,
        )
        if told.returncode:
            raise GateError(f"image {name!r}: {_last_line(told.stderr)}")
        id_, _, digest = told.stdout.strip().partition(" ")
        # What is judged is in the image, so the hub is not asked.
        offline = ["--env", "HF_HUB_OFFLINE=1"]
        isolation = os.environ.get("BUILDAH_ISOLATION", "chroot")
        image = Image(name, id_, digest)
        yield image, ["buildah", "run", "--isolation", isolation, *offline, made, "--", "python"]
    finally:
        subprocess.run(["buildah", "rm", made], stdout=subprocess.DEVNULL, check=False)


def run(
    python: Sequence[str],
    options: Sequence[str],
    texts: Sequence[Text],
    see: Callable[[Rows], None],
) -> tuple[Rows, str]:
    """Run the runner on `texts` by the command `python`; `see` is called after each of its lines.

    Returns:
        What it wrote, parsed and as it was.

    Raises:
        GateError: the runner says that the model cannot be had.
        RunnerError: it ended before its work did, or wrote something else.
    """
    rows, lines = Rows(), []
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as errors:
        # Without the synopses: the runner is not told what is expected.
        for text in texts:
            given.write(json.dumps({"id": text.id, "text": text.text}) + "\n")
        given.seek(0)
        process = subprocess.Popen(
            [*python, "-c", RUNNER.read_text(encoding="utf-8"), *options],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                try:
                    rows.add(line)
                except GateError as error:
                    raise RunnerError(str(error)) from None
                see(rows)
            status = process.wait()
        finally:
            _end(process)
        errors.seek(0)
        last = _last_line(errors.read())
    if status == 2 and not rows.model:
        raise GateError(last or "the runner refused its arguments")
    if status:
        raise RunnerError(f"exit status {status}: {last or 'it said nothing'}")
    return rows, "".join(lines)


def local() -> list[str]:
    """The command of this environment's Python."""
    return [sys.executable]


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(text: str) -> str:
    # buildah repeats the exit status after what the program said.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not re.match(r"subprocess exited|Error: exit status", line)]
    return (told or lines or [""])[-1]
