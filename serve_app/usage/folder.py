"""The folder that holds usage events, and the names of the segments in it.

A writer never renames a file: when one is full it begins another. So a name and an offset say for
ever which bytes are meant, which is all that whoever follows the folder has to remember. Names sort
by the time at which they were begun, and any number of processes can write side by side.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from serve_app.places import own_path

PREFIX, SUFFIX = "usage-", ".jsonl"


def default_usage_folder() -> Path:
    """The user's own folder; `T5_SERVE_USAGE_FOLDER` and `XDG_STATE_HOME` move it."""
    return own_path("T5_SERVE_USAGE_FOLDER", "XDG_STATE_HOME", "~/.local/state", "t5-serve/usage")


def segments(folder: Path) -> list[Path]:
    """The segments in a folder, oldest first. None where there is no folder."""
    return sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))


def begin_segment(folder: Path) -> BinaryIO:
    """A new segment, unbuffered, locked for as long as it is open.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    path = folder / f"{PREFIX}{moment}-{secrets.token_hex(4)}{SUFFIX}"
    file = open(path, "xb", buffering=0, opener=_private)  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def prune(folder: Path, keep: int) -> None:
    """Remove the oldest segments beyond `keep`, but none that a writer has open."""
    for path in segments(folder)[:-keep]:
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:  # open elsewhere (locked), or removed by another writer
            continue


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
