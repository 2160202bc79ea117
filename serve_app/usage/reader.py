"""Reads usage events and NGINX's access log back: plain or gzip files, folders of them, streams.

What is read is what the export to BigQuery has, too: a time and the rest of the line. A line that
is neither an event nor an access-log line is not of interest (other programs log to the same
stream); a line that should be one and cannot be read is counted.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path

_GZIP = b"\x1f\x8b"
_MESSAGES = ("request", "access")
_LINE = 1 << 20  # bytes; an event has about a thousand
_SUFFIXES = (".jsonl", ".log", ".json", ".gz")


class UsageReadError(Exception):
    """A file or folder cannot be read; the message says which and why, in one line."""


@dataclass
class Tally:
    """What reading met."""

    files: int = 0
    lines: int = 0  # events and access-log lines
    ignored: int = 0  # lines of other kinds
    broken: list[str] = field(default_factory=list)  # `FILE:LINE: reason` of the first few
    broken_lines: int = 0

    def breaks(self, where: str, reason: str, keep: int = 5) -> None:
        """Count a line that cannot be read."""
        self.broken_lines += 1
        if len(self.broken) < keep:
            self.broken.append(f"{where}: {reason}")


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its time, and all else as JSON text, as Cloud Logging exports it."""

    time: datetime
    payload: str


def files_of(path: Path) -> list[Path]:
    """The file itself, or a folder's logs in the order of their names.

    Raises:
        UsageReadError: there is no such path, or nothing to read in the folder.
    """
    if not path.is_dir():
        if not path.exists():
            raise UsageReadError(f"{path}: no such file or folder")
        return [path]
    # access.log.1 and access.log.2.gz are logrotate's.
    found = [
        one
        for one in sorted(path.iterdir())
        if one.is_file()
        and (one.suffix in _SUFFIXES or (one.suffix[1:].isdigit() and ".log" in one.name))
    ]
    if not found:
        raise UsageReadError(f"{path}: no logs in this folder")
    return found


def read_files(paths: list[Path], tally: Tally) -> Iterator[Line]:
    """The lines of files and folders, oldest file first within each folder.

    Raises:
        UsageReadError: a path cannot be opened.
    """
    for path in paths:
        for file in files_of(path):
            try:
                with file.open("rb") as stream:
                    yield from read_stream(stream, str(file), tally)
            except OSError as error:
                raise UsageReadError(f"{file}: {error.strerror or error}") from None


def read_stream(stream: BufferedReader, name: str, tally: Tally) -> Iterator[Line]:
    """The lines of one open file, gzip or plain, whatever its name says."""
    tally.files += 1
    opened: BufferedReader | gzip.GzipFile = stream
    if stream.peek(2)[:2] == _GZIP:
        opened = gzip.GzipFile(fileobj=stream)
    number = 0
    while True:
        number += 1
        where = f"{name}:{number}"
        try:
            raw = opened.readline(_LINE)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            tally.breaks(where, f"gzip: {error}")
            return
        if not raw:
            return
        try:
            line = _parse(raw)
        except ValueError as error:
            tally.breaks(where, str(error))
            continue
        if line is None:
            tally.ignored += 1
        else:
            tally.lines += 1
            yield line


def _parse(raw: bytes) -> Line | None:
    """A line that is of interest; None for any other.

    Raises:
        ValueError: it should be of interest and cannot be read; says why.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        # Programs print other things, too; what begins as an object was meant to be one.
        if raw.lstrip().startswith(b"{"):
            raise ValueError("not JSON") from None
        return None
    if not isinstance(content, dict) or content.get("message") not in _MESSAGES:
        return None
    if not isinstance(content.get("request_id"), str):
        raise ValueError("no request_id")
    moment = _time(content.get("time"))
    if moment is None:
        raise ValueError("no time")
    # All that reports need is flat; what is deep or huge could only trouble them.
    flat = {
        name: value
        for name, value in content.items()
        if name != "time" and isinstance(value, str | int | float) and _small(value)
    }
    try:
        payload = json.dumps(flat, allow_nan=False, ensure_ascii=False)
        payload.encode()
    except ValueError:  # JSON has no NaN, and UTF-8 no lone surrogates
        raise ValueError("not JSON in UTF-8") from None
    return Line(moment, payload)


def _small(value: str | int | float) -> bool:
    return not isinstance(value, int) or value.bit_length() < 64


def _time(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
