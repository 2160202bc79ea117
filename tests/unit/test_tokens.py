"""The tokens file and the store that follows it."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serve_app.tokens import (
    TokenFileError,
    TokenStore,
    create,
    default_tokens_file,
    dev_token,
    list_records,
    read_dev_token,
    revoke,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t5-serve" / "tokens.json"


def record(token: str, client: str = "shop", **changes: object) -> dict[str, object]:
    said: dict[str, object] = {
        "id": "0a1b2c3d",
        "client": client,
        "sha256": hashlib.sha256(token.encode()).hexdigest(),
        "created": "2026-01-01T00:00:00Z",
        "expires": None,
    }
    return {**said, **changes}


def put(path: Path, *records: dict[str, object], **changes: object) -> None:
    path.parent.mkdir(exist_ok=True)
    content = {"version": 1, "tokens": list(records), **changes}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def test_a_created_token_is_kept_as_its_digest_only(path: Path) -> None:
    made, token = create(path, "web-shop", None)
    assert re.fullmatch(r"t5s_[-_A-Za-z0-9]{43}", token)
    content = json.loads(path.read_text())
    assert content["version"] == 1
    assert [set(one) for one in content["tokens"]] == [
        {"client", "sha256", "created", "expires", "id"}
    ]
    assert content["tokens"][0]["sha256"] == hashlib.sha256(token.encode()).hexdigest()
    assert content["tokens"][0]["client"] == "web-shop"
    assert content["tokens"][0]["id"] == made.id
    assert token not in path.read_text()
    assert abs(made.created - datetime.now(UTC)) < timedelta(minutes=1)


def test_file_and_folder_are_closed_to_others_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        create(path, "shop", None)
        dev_token(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for name in ("tokens.json", "tokens.json.lock", "dev-token"):
        assert stat.S_IMODE((path.parent / name).stat().st_mode) == 0o600, name
    assert {entry.name for entry in path.parent.iterdir()} == {
        "tokens.json",
        "tokens.json.lock",
        "dev-token",
    }


def test_a_store_knows_its_tokens_and_no_others(path: Path) -> None:
    put(path, record("t5s_one"), record("t5s_two", "job", id="b"))
    store = TokenStore(path)
    assert store.verify("t5s_one") == "shop"
    assert store.verify("t5s_two") == "job"
    digest = hashlib.sha256(b"t5s_one").hexdigest()
    for wrong in ("", "t5s_", "t5s_onE", "t5s_one ", digest, "é\udcff"):
        assert store.verify(wrong) is None, wrong
    assert store.reload_errors == 0


def test_a_token_is_compared_with_all_digests_and_in_constant_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path, *(record(f"t5s_{n}", id=f"0000000{n}", client=f"client-{n}") for n in range(5)))
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest

    def watched(one: str, other: str) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    store = TokenStore(path)
    # The first, the last and none of them: nothing is left out once one has been found.
    for token, client in (("t5s_0", "client-0"), ("t5s_4", "client-4"), ("t5s_5", None)):
        compared.clear()
        assert store.verify(token) == client
        digest = hashlib.sha256(token.encode()).hexdigest()
        assert [pair[1] for pair in compared] == [digest] * 5
        assert len({pair[0] for pair in compared}) == 5


def test_no_file_means_no_tokens(path: Path) -> None:
    store = TokenStore(path)
    assert store.verify("t5s_one") is None
    assert store.reload_errors == 0
    assert list_records(path) == []
    assert revoke(path, "shop") == 0
    assert not path.parent.exists()


def test_expiry_is_honoured(path: Path) -> None:
    now = datetime.now(UTC)
    put(
        path,
        record("t5s_old", expires=(now - timedelta(seconds=1)).isoformat()),
        record("t5s_new", expires=(now + timedelta(hours=1)).isoformat()),
    )
    store = TokenStore(path)
    assert store.verify("t5s_old") is None
    assert store.verify("t5s_new") == "shop"


def test_a_token_expires_while_the_store_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, token = create(path, "shop", timedelta(hours=1))
    store = TokenStore(path)
    assert store.verify(token) == "shop"

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(minutes=61)

    monkeypatch.setattr("serve_app.tokens.datetime", Later)
    assert store.verify(token) is None


@pytest.mark.parametrize("lifetime", [timedelta(0), timedelta(seconds=-1), timedelta.max])
def test_impossible_lifetimes_are_refused(path: Path, lifetime: timedelta) -> None:
    with pytest.raises(TokenFileError, match="expires"):
        create(path, "shop", lifetime)
    assert list_records(path) == []


def test_a_running_store_follows_the_file(path: Path) -> None:
    store = TokenStore(path)
    assert store.verify("t5s_none") is None
    made, token = create(path, "shop", None)
    assert store.verify(token) == "shop"
    _, other = create(path, "job", None)
    assert store.verify(other) == "job"
    assert revoke(path, made.id) == 1
    assert store.verify(token) is None
    assert store.verify(other) == "job"
    path.unlink()
    assert store.verify(other) is None
    assert store.reload_errors == 0


def test_a_change_of_the_same_size_is_followed(path: Path) -> None:
    put(path, record("t5s_one"))
    store = TokenStore(path)
    assert store.verify("t5s_one") == "shop"
    size = path.stat().st_size
    put(path, record("t5s_two"))
    assert path.stat().st_size == size
    assert store.verify("t5s_two") == "shop"
    assert store.verify("t5s_one") is None


def test_an_unchanged_file_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(path, record("t5s_one"))
    store = TokenStore(path)
    store.verify("t5s_one")
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("read again"))
    assert store.verify("t5s_one") == "shop"


BROKEN = {
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe",
    "not an object": "[]",
    "empty": "",
    "another version": json.dumps({"version": 2, "tokens": []}),
    "no version": json.dumps({"tokens": []}),
    "unknown key": json.dumps({"version": 1, "tokens": [], "more": 1}),
    "unknown key in a token": json.dumps({"version": 1, "tokens": [record("t", extra=1)]}),
    "a plain token": json.dumps({"version": 1, "tokens": [record("t", sha256="t5s_one")]}),
    "upper-case digest": json.dumps({"version": 1, "tokens": [record("t", sha256="A" * 64)]}),
    "bad client": json.dumps({"version": 1, "tokens": [record("t", "a b")]}),
    "no time zone": json.dumps(
        {"version": 1, "tokens": [record("t", expires="2026-01-01T00:00:00")]}
    ),
    "expires not a string": json.dumps({"version": 1, "tokens": [record("t", expires=1)]}),
    "no expires": json.dumps(
        {"version": 1, "tokens": [{k: v for k, v in record("t").items() if k != "expires"}]}
    ),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_keeps_the_last_good_state(
    path: Path, content: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(path, record("t5s_one"))
    store = TokenStore(path)
    assert store.verify("t5s_one") == "shop"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.ERROR, logger="serve_app"):
        assert [store.verify("t5s_one") for _ in range(3)] == ["shop"] * 3
    assert store.reload_errors == 1
    assert len(caplog.records) == 1
    with pytest.raises(TokenFileError) as caught:
        list_records(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(TokenFileError):
        create(path, "shop", None)
    put(path, record("t5s_two"))
    assert store.verify("t5s_two") == "shop"
    assert store.verify("t5s_one") is None


def test_a_file_broken_from_the_start_lets_nobody_in(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("{")
    store = TokenStore(path)
    assert store.verify("t5s_one") is None
    assert store.reload_errors == 1


def test_a_path_that_cannot_be_read_is_told_once_and_tried_again(path: Path) -> None:
    path.mkdir(parents=True)
    store = TokenStore(path)
    assert [store.verify("t5s_one") for _ in range(3)] == [None] * 3
    assert store.reload_errors == 1
    path.rmdir()
    put(path, record("t5s_one"))
    assert store.verify("t5s_one") == "shop"


def test_revoking_by_client_takes_all_its_tokens(path: Path) -> None:
    _, first = create(path, "shop", None)
    _, second = create(path, "shop", None)
    _, other = create(path, "job", None)
    assert revoke(path, "shop") == 2
    assert revoke(path, "shop") == 0
    store = TokenStore(path)
    assert [store.verify(token) for token in (first, second, other)] == [None, None, "job"]


@pytest.mark.parametrize("client", ["", "a b", "a" * 65, "é", "a\n", "a/b", "shop\0"])
def test_bad_client_names_are_refused(path: Path, client: str) -> None:
    with pytest.raises(TokenFileError, match="client"):
        create(path, client, None)


def test_a_client_cannot_take_the_id_of_a_token(path: Path) -> None:
    made, _ = create(path, "shop", None)
    with pytest.raises(TokenFileError, match="id of a token"):
        create(path, made.id, None)


def test_changes_at_once_are_all_kept(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: create(path, f"client-{i}", None), range(24)))
    assert {one.client for one in list_records(path)} == {f"client-{i}" for i in range(24)}
    store = TokenStore(path)
    assert all(store.verify(token) == one.client for one, token in made)


def test_a_link_to_the_file_stays_a_link(path: Path, tmp_path: Path) -> None:
    create(path, "shop", None)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    _, token = create(link, "job", None)
    assert link.is_symlink()
    assert TokenStore(path).verify(token) == "job"


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, token = create(path, "shop", None)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TokenFileError, match="No space left"):
        create(path, "job", None)
    assert TokenStore(path).verify(token) == "shop"
    assert {entry.name for entry in path.parent.iterdir()} == {"tokens.json", "tokens.json.lock"}


def test_the_development_token_is_made_once(path: Path) -> None:
    assert read_dev_token(path) is None
    token = dev_token(path)
    assert dev_token(path) == token
    assert read_dev_token(path) == token
    assert TokenStore(path).verify(token) == "dev"
    assert len(list_records(path)) == 1


def test_a_revoked_development_token_is_replaced(path: Path) -> None:
    token = dev_token(path)
    assert revoke(path, "dev") == 1
    again = dev_token(path)
    assert again != token
    store = TokenStore(path)
    assert store.verify(again) == "dev"
    assert store.verify(token) is None


def test_where_the_tokens_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("T5_SERVE_TOKENS_FILE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_tokens_file() == tmp_path / ".config/t5-serve/tokens.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert default_tokens_file() == tmp_path / ".config/t5-serve/tokens.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/xdg")
    assert default_tokens_file() == Path("/xdg/t5-serve/tokens.json")
    monkeypatch.setenv("T5_SERVE_TOKENS_FILE", "~/mine.json")
    assert default_tokens_file() == tmp_path / "mine.json"
