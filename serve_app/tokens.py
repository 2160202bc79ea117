"""The tokens file: who may call the service. It holds SHA-256 digests, never a token itself.

A token is 256 random bits, so one plain hash is enough: there is nothing to guess, and a digest
that leaks does not give the token away.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from serve_app.places import own_path

logger = logging.getLogger(__name__)

# Every token starts with it, so that scanners for leaked secrets can find them.
TOKEN_PREFIX = "t5s_"  # noqa: S105
DEV_CLIENT = "dev"

_CLIENT = r"[-._A-Za-z0-9]{1,64}"


class TokenFileError(Exception):
    """The tokens cannot be read or changed; the message says why, in one line."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TokenRecord(_Strict):
    """One token, known by its digest."""

    id: Annotated[str, Field(min_length=1, max_length=64)]
    client: Annotated[str, Field(pattern=f"^{_CLIENT}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: AwareDatetime
    expires: AwareDatetime | None

    def live(self, now: datetime) -> bool:
        """Whether the token has not expired."""
        return self.expires is None or now < self.expires


class _Content(_Strict):
    version: Literal[1]
    tokens: list[TokenRecord]


def default_tokens_file() -> Path:
    """The user's own tokens file; `T5_SERVE_TOKENS_FILE` and `XDG_CONFIG_HOME` move it."""
    return own_path("T5_SERVE_TOKENS_FILE", "XDG_CONFIG_HOME", "~/.config", "t5-serve/tokens.json")


def create(path: Path, client: str, expires_in: timedelta | None) -> tuple[TokenRecord, str]:
    """Add a token for `client`. Gives its record and the token, which is kept nowhere.

    Raises:
        TokenFileError: a bad name or lifetime, or the file cannot be read or written.
    """
    with _locked(path) as target:
        return _add(target, client, expires_in)


def rotate(
    path: Path, client: str, overlap: timedelta, expires_in: timedelta | None
) -> tuple[TokenRecord, str]:
    """Add a token for `client` and let its others expire once `overlap` has passed.

    Raises:
        TokenFileError: as `create`.
    """
    with _locked(path) as target:
        records = list_records(target)
        record, token = issue(records, client, expires_in)
        _write(target, [*retired(records, client, overlap), record])
        return record, token


def prune(path: Path) -> int:
    """Remove what has expired. Gives how many there were.

    Raises:
        TokenFileError: the file cannot be read or written.
    """
    if not list_records(path):
        return 0
    with _locked(path) as target:
        records = list_records(target)
        kept = unexpired(records)
        if len(kept) < len(records):
            _write(target, kept)
        return len(records) - len(kept)


def list_records(path: Path) -> list[TokenRecord]:
    """All records, expired ones too; a file that does not exist has none.

    Raises:
        TokenFileError: the file cannot be read.
    """
    try:
        return parse(str(path), path.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _file_error(path, error) from None


def revoke(path: Path, client_or_id: str) -> int:
    """Remove all tokens of a client, or the one with that id. Gives how many there were.

    Raises:
        TokenFileError: the file cannot be read or written.
    """
    if not list_records(path):  # nothing to change: leave no file and no lock behind
        return 0
    with _locked(path) as target:
        records = list_records(target)
        kept = without(records, client_or_id)
        if len(kept) < len(records):
            _write(target, kept)
        return len(records) - len(kept)


def dev_token(path: Path) -> str:
    """The development token of `t5-serve run`: made on first use, kept beside the tokens file.

    Raises:
        TokenFileError: a file cannot be read or written.
    """
    with _locked(path) as target:
        kept = read_dev_token(path)
        if kept is not None and _find(list_records(target), kept) is not None:
            return kept
        _, token = _add(target, DEV_CLIENT, None)
        _replace(_dev_file(path), token + "\n")
        return token


def read_dev_token(path: Path) -> str | None:
    """The development token beside the tokens file `path`, or None where there is none."""
    try:
        return _dev_file(path).read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


class TokenStore:
    """Checks tokens against a tokens file, following its changes while it runs.

    Attributes:
        reload_errors: how many broken states of the file were met.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: list[TokenRecord] = []
        self._seen: tuple[int, int, int] | None = None
        self._complaint: str | None = None
        self.reload_errors = 0

    def verify(self, token: str) -> str | None:
        """The client whose token this is; None if it is not known or has expired."""
        self._follow()
        record = _find(self._records, token)
        return None if record is None else record.client

    def _follow(self) -> None:
        try:
            if _signature(self._path.stat()) == self._seen:
                return
            with self._path.open("rb") as file:
                # Of the file that is read: the path may lead to a newer one by now.
                seen = _signature(os.fstat(file.fileno()))
                content = file.read()
        except FileNotFoundError:
            self._records, self._seen, self._complaint = [], None, None
            return
        except OSError as error:
            # Not remembered as seen: a change of permissions does not show in the signature.
            self._seen = None
            self._broken(_file_error(self._path, error))
            return
        self._seen = seen
        try:
            self._records = parse(str(self._path), content)
            self._complaint = None
        except TokenFileError as error:
            # A slip in an edit must not lock everybody out: the last good set stays in force.
            self._broken(error, repeat=True)

    def _broken(self, error: TokenFileError, *, repeat: bool = False) -> None:
        if repeat or str(error) != self._complaint:
            self.reload_errors += 1
            logger.error("tokens file is broken, its last good state is kept: %s", error)
        self._complaint = str(error)


def _signature(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _find(records: list[TokenRecord], token: str) -> TokenRecord | None:
    """The live record of a token. Takes the same time wherever in the list it is."""
    digest, now = _hash(token), datetime.now(UTC)
    found = None
    for record in records:
        if hmac.compare_digest(record.sha256, digest) and record.live(now):
            found = record
    return found


def _add(target: Path, client: str, expires_in: timedelta | None) -> tuple[TokenRecord, str]:
    records = list_records(target)
    record, token = issue(records, client, expires_in)
    _write(target, [*records, record])
    return record, token


def issue(
    records: list[TokenRecord], client: str, expires_in: timedelta | None
) -> tuple[TokenRecord, str]:
    """Make a token for `client` beside those of `records`. Gives its record and the token.

    Raises:
        TokenFileError: a bad name or lifetime.
    """
    if re.fullmatch(_CLIENT, client) is None:
        raise TokenFileError(f"client name {client[:100]!r}: must be 1 to 64 of A-Z a-z 0-9 - . _")
    # `revoke` takes either, so an id must not read as somebody's name, nor a name as an id.
    if any(client == record.id for record in records):
        raise TokenFileError(f"client name {client!r}: is the id of a token")
    taken = {client, *(name for record in records for name in (record.id, record.client))}
    token_id = secrets.token_hex(4)
    while token_id in taken:
        token_id = secrets.token_hex(4)
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    record = TokenRecord(
        id=token_id,
        client=client,
        sha256=_hash(token),
        created=datetime.now(UTC).replace(microsecond=0),
        expires=None if expires_in is None else _expiry(expires_in),
    )
    return record, token


def without(records: list[TokenRecord], client_or_id: str) -> list[TokenRecord]:
    """The records of other clients and with other ids."""
    return [record for record in records if client_or_id not in (record.id, record.client)]


def unexpired(records: list[TokenRecord]) -> list[TokenRecord]:
    """The records that have not expired."""
    now = datetime.now(UTC)
    return [record for record in records if record.live(now)]


def retired(records: list[TokenRecord], client: str, overlap: timedelta) -> list[TokenRecord]:
    """The records with those of `client` expiring after `overlap`, if they did not before."""
    if overlap <= timedelta(0):
        return without(records, client)
    last = _expiry(overlap).replace(microsecond=0)
    return [
        record
        if record.client != client or (record.expires is not None and record.expires <= last)
        else record.model_copy(update={"expires": last})
        for record in records
    ]


def _expiry(lifetime: timedelta) -> datetime:
    if lifetime <= timedelta(0):
        raise TokenFileError("expires: must be above 0")
    try:
        return datetime.now(UTC) + lifetime
    except OverflowError:
        raise TokenFileError("expires: beyond the year 9999; leave it out for never") from None


def parse(where: str, content: str | bytes) -> list[TokenRecord]:
    """Read the records of a tokens file.

    Raises:
        TokenFileError: it is not one; the message begins with `where`.
    """
    try:
        return _Content.model_validate_json(content).tokens
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # A name in the file may hold anything.
        path = ".".join(
            str(part) if str(part).isprintable() else repr(part) for part in first["loc"]
        )
        raise TokenFileError(f"{where}: {path + ': ' if path else ''}{first['msg']}") from None


def dump(records: list[TokenRecord]) -> str:
    """Write the content of a tokens file."""
    return _Content(version=1, tokens=records).model_dump_json(indent=2) + "\n"


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Hold the lock for changes. Gives the file itself, where `path` is a link to it."""
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A file of its own: the tokens file is replaced, and a lock on it would go with it.
        lock = os.open(target.with_name(target.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _file_error(target, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield target
    finally:
        os.close(lock)


def _write(target: Path, records: list[TokenRecord]) -> None:
    _replace(target, dump(records))


def _replace(target: Path, text: str) -> None:
    """Put a file in place at once: a reader sees the old content or the new, never a part."""
    try:
        # mkstemp gives mode 0600, whatever the umask.
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _file_error(target, error) from None


def _file_error(path: Path, error: OSError) -> TokenFileError:
    return TokenFileError(f"{path}: {error.strerror or error}")


def _dev_file(path: Path) -> Path:
    return Path(os.path.realpath(path)).with_name("dev-token")
