"""Writes usage events away from the hot path: a bounded queue, and one thread that empties it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from serve_app.usage.folder import begin_segment, prune

logger = logging.getLogger(__name__)

_BATCH = 256  # events of one write
_CLOSE_S = 5.0


class UsageSink(Protocol):
    """Takes usage events."""

    def record(self, event: Mapping[str, Any]) -> None:
        """Take an event; never blocks, never raises."""


class UsageWriter:
    """`UsageSink` on a folder of JSON lines.

    An event that finds the queue full, or that cannot be written, is dropped and counted: in
    `on_drop`, and as `dropped_events` of the next event that is written.

    Args:
        folder: where the segments go; made when it is not there.
        max_bytes: a segment is followed by another when it has so many.
        keep: segments in the folder at most, those of other processes included.
        queue_size: events that may wait.
        common: fields of every event, such as the replica.
        on_drop: told how many events were just dropped, from any thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        keep: int,
        queue_size: int,
        common: Mapping[str, Any] | None = None,
        on_drop: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._keep = keep
        self._queue_size = queue_size
        self._common = dict(common or {})
        self._on_drop = on_drop
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._changed = threading.Condition()
        self._dropped = 0
        self._closed = False
        self._file: BinaryIO | None = None
        self._size = 0
        self._thread = threading.Thread(target=self._run, name="usage-writer", daemon=True)
        self._thread.start()

    def record(self, event: Mapping[str, Any]) -> None:
        """See `UsageSink.record`."""
        with self._changed:
            full = self._closed or len(self._waiting) >= self._queue_size
            if full:
                self._dropped += 1
            else:
                self._waiting.append(event)
                self._changed.notify()
        if full:
            self._on_drop(1)

    def close(self) -> None:
        """Write what waits, then stop. Later events are dropped. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                count = min(len(self._waiting), _BATCH)
                batch = [self._waiting.popleft() for _ in range(count)]
                dropped = 0
                if batch:
                    dropped, self._dropped = self._dropped, 0
                ended = self._closed and not self._waiting
            if batch:
                self._write(batch, dropped)
            if ended:
                self._end_segment()
                return

    def _write(self, batch: list[Mapping[str, Any]], dropped: int) -> None:
        first = {**batch[0], "dropped_events": dropped} if dropped else batch[0]
        lines = b"".join(_line({**event, **self._common}) for event in [first, *batch[1:]])
        try:
            self._append(lines)
        except OSError as error:
            logger.error("usage events cannot be written", extra={"reason": str(error)})
            self._end_segment()  # it may end in half a line, and its folder may have gone
            with self._changed:
                self._dropped += dropped + len(batch)
            self._on_drop(len(batch))

    def _append(self, lines: bytes) -> None:
        """Append whole lines, to a new segment if they do not fit.

        Raises:
            OSError: they could not be written, or not wholly.
        """
        if self._size and self._size + len(lines) > self._max_bytes:
            self._end_segment()
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
            self._end_segment()  # it was removed, with its folder perhaps: nobody could read it
        if self._file is None:
            self._file = begin_segment(self._folder)
            prune(self._folder, self._keep)
        written = self._file.write(lines)
        self._size += written
        if written != len(lines):  # the disk filled up in the middle
            raise OSError(f"{written} of {len(lines)} bytes written")

    def _end_segment(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file, self._size = None, 0


def _line(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"
