"""Sends usage events to Cloud Logging's API: where `usage tail --to google-cloud-logging` writes.

It runs beside the service, never in a replica. `Tail` remembers how far it got only once lines have
been taken, so an outage of the API delays events and loses none. One that is sent twice has the
same time and insertId both times, by which Cloud Logging knows it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.cloud.logging_v2.services.logging_service_v2 import LoggingServiceV2Client
    from google.cloud.logging_v2.types import LogEntry

_ENTRIES = 500  # of a request; the API takes 10 MB
_TIMEOUT_S = 20.0
_GIVE_UP_S = 60.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0


class MissingGcpError(Exception):
    """google-cloud-logging is not installed."""


class CloudLoggingError(OSError):
    """The lines could not be sent; none of them counts as passed on."""


class CloudLogging:
    """A destination of `Tail`: whole lines in, entries of a log out.

    Args:
        client: of the API, from `connect`.
        project: whose log; also that of the traces.
        log: the log's id.
        stop: ends the waiting for an API that cannot be reached. None: it ends after a minute.
        say: told of lines that the API cannot take, and of an outage.
    """

    def __init__(
        self,
        client: LoggingServiceV2Client,
        project: str,
        log: str,
        stop: threading.Event | None,
        say: Callable[[str], None],
    ) -> None:
        self._client = client
        self._project = project
        self._log_name = f"projects/{project}/logs/{log}"
        self._stop = stop
        self._say = say

    def write(self, lines: bytes) -> int:
        """Send whole lines. Gives their bytes once all have been taken.

        Raises:
            CloudLoggingError: refused, or the wait for the API has ended.
        """
        entries = list(self._entries(lines))
        for first in range(0, len(entries), _ENTRIES):
            self._send(entries[first : first + _ENTRIES])
        return len(lines)

    def flush(self) -> None:
        """Nothing waits here."""

    def _entries(self, lines: bytes) -> Iterator[LogEntry]:
        broken = 0
        for line in lines.splitlines():
            try:
                yield entry(line, self._project)
            except (ValueError, TypeError, KeyError):
                broken += 1
        if broken:
            self._say(f"{broken} lines are no usage events and were left out")

    def _send(self, entries: list[LogEntry]) -> None:
        from google.api_core.exceptions import GoogleAPICallError, InvalidArgument, RetryError

        waited_s, wait_s = 0.0, _FIRST_WAIT_S
        while True:
            try:
                self._client.write_log_entries(
                    {
                        "log_name": self._log_name,
                        "resource": {"type": "global", "labels": {"project_id": self._project}},
                        "labels": {"host": platform.node()},
                        "entries": entries,
                        # Without it one bad entry would hold all others back.
                        "partial_success": True,
                    },
                    retry=None,
                    timeout=_TIMEOUT_S,
                )
                if waited_s:
                    self._say(f"Cloud Logging takes events again, after {waited_s:.0f} s")
                return
            except InvalidArgument as error:
                # The entries that are wrong stay so, and the others have been taken.
                self._say(f"Cloud Logging refused some of {len(entries)} events: {error.message}")
                return
            except (GoogleAPICallError, RetryError) as error:
                if not _passes(error):
                    raise CloudLoggingError(None, f"{self._log_name}: {error}") from error
                if not waited_s:
                    self._say(f"Cloud Logging does not answer, events wait: {error}")
                if not self._wait(wait_s, waited_s):
                    raise CloudLoggingError(
                        None, f"{self._log_name}: not sent, the next run goes on there: {error}"
                    ) from error
            waited_s, wait_s = waited_s + wait_s, min(wait_s * 2, _LONGEST_WAIT_S)

    def _wait(self, seconds: float, already_s: float) -> bool:
        """Wait before the next attempt; false if there is to be none."""
        if self._stop is not None:
            return not self._stop.wait(seconds)
        if already_s >= _GIVE_UP_S:
            return False
        time.sleep(seconds)
        return True


def connect(project: str | None) -> tuple[LoggingServiceV2Client, str]:
    """A client with the credentials of the environment, and the project: the given one, or theirs.

    Raises:
        MissingGcpError: the extra is not installed.
        CloudLoggingError: no credentials, or no project.
    """
    try:
        import google.auth
        from google.cloud.logging_v2.services.logging_service_v2 import LoggingServiceV2Client
    except ImportError:
        raise MissingGcpError(
            "google-cloud-logging is not installed: pip install 't5-serve[gcp]'"
        ) from None
    scopes = ["https://www.googleapis.com/auth/logging.write"]
    try:
        credentials, found = google.auth.default(scopes=scopes)
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise CloudLoggingError(None, f"no credentials: {error}") from None
    if not (project or found):
        raise CloudLoggingError(None, "no project: give --project")
    return LoggingServiceV2Client(credentials=credentials), str(project or found)


def entry(line: bytes, project: str) -> LogEntry:
    """The entry of a usage event.

    Raises:
        ValueError, TypeError, KeyError: the line is none.
    """
    from google.cloud.logging_v2.types import LogEntry
    from google.protobuf.struct_pb2 import Struct

    event = json.loads(line)
    if not (isinstance(event, dict) and isinstance(event["request_id"], str)):
        raise ValueError("not a usage event")
    payload = Struct()
    # `time` and `severity` are fields of the entry.
    payload.update({name: event[name] for name in event if name not in ("time", "severity")})
    trace_id = event.get("trace_id")
    return LogEntry(
        timestamp=datetime.fromisoformat(event["time"]),
        severity=severity(event),
        insert_id=hashlib.sha256(line).hexdigest()[:32],
        json_payload=payload,
        trace=f"projects/{project}/traces/{trace_id}" if trace_id else "",
    )


def severity(event: dict[str, Any]) -> str:
    """ERROR where the service failed, WARNING where it refused, else INFO."""
    status, error = int(event["status"]), event.get("error_type")
    if status >= 500 or (status < 400 and error not in (None, "client-closed")):
        return "ERROR"  # the latter: a stream that ended in an error
    return "WARNING" if status >= 400 else "INFO"


def _passes(error: Exception) -> bool:
    """Whether it is worth another attempt: not where permissions or names are wrong."""
    from google.api_core import exceptions

    lasting = (exceptions.PermissionDenied, exceptions.Unauthenticated, exceptions.NotFound)
    return not isinstance(error, lasting)
