"""Follows the folder of usage events and passes its lines on: what the sidecar runs.

How far it got in each segment is kept in a checkpoint, written after the lines have been passed on.
So a tail that is killed between the two repeats the last lines when it comes back (reports count a
repeated line once), and one that is stopped in an orderly way neither repeats nor loses any. A line
without its end is left until it has one.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Protocol

from serve_app.usage.folder import segments

_READ = 1 << 20  # bytes
_POLL_S = 0.5
_CHECKPOINT = "tail.checkpoint"


class Destination(Protocol):
    """Where whole lines go; `write` takes all of them, or raises `OSError`."""

    def write(self, lines: bytes, /) -> int:
        """Take them."""

    def flush(self) -> None:
        """Have taken them."""


class Tail:
    """Passes on the lines that it has not passed on yet.

    Args:
        folder: the folder of segments; it may not exist yet.
        out: where whole lines go.
        checkpoint: the file that remembers how far; default: in the folder.

    Raises:
        OSError: the checkpoint cannot be read. One that makes no sense counts as none.
    """

    def __init__(self, folder: Path, out: Destination, checkpoint: Path | None = None) -> None:
        self._folder = folder
        self._out = out
        self._checkpoint = checkpoint or folder / _CHECKPOINT
        self._offsets = self._load()

    def follow(self, stop: threading.Event) -> None:
        """Pass lines on as they come, until `stop`; then those that are there by then.

        Raises:
            OSError: see `pass_on`.
        """
        while not stop.is_set():
            if not self.pass_on():
                stop.wait(_POLL_S)
        self.drain()

    def drain(self) -> None:
        """Pass on all that is there. Raises as `pass_on` does."""
        while self.pass_on():
            pass

    def pass_on(self) -> int:
        """Pass on what is there now, at most a piece of each segment. Gives the bytes of it.

        Raises:
            OSError: reading, writing or the checkpoint failed.
        """
        there = {path.name: path for path in segments(self._folder)}
        # Forget segments that have been removed, or the checkpoint would grow for ever.
        offsets = {name: at for name, at in self._offsets.items() if name in there}
        passed = 0
        for name, path in there.items():
            lines = self._read(path, offsets.get(name, 0))
            self._out.write(lines)
            offsets[name] = offsets.get(name, 0) + len(lines)
            passed += len(lines)
        self._out.flush()
        if offsets != self._offsets:
            self._offsets = offsets
            self._save()
        return passed

    def _read(self, path: Path, offset: int) -> bytes:
        """Whole lines from an offset on."""
        try:
            with path.open("rb") as file:
                file.seek(offset)
                piece = file.read(_READ)
        except FileNotFoundError:  # removed since it was listed
            return b""
        return piece[: piece.rfind(b"\n") + 1]

    def _load(self) -> dict[str, int]:
        try:
            kept = json.loads(self._checkpoint.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        if not isinstance(kept, dict):
            return {}
        return {
            name: at
            for name, at in kept.items()
            if isinstance(at, int) and not isinstance(at, bool) and at >= 0
        }

    def _save(self) -> None:
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        new = self._checkpoint.with_name(self._checkpoint.name + ".new")
        with new.open("w") as file:
            json.dump(self._offsets, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._checkpoint)
