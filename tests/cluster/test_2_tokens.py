"""Tokens in the Secret, as clients meet them."""

from __future__ import annotations

from tests.cluster.kube import until
from tests.cluster.release import Release


def _status(release: Release, token: str | None) -> int:
    answer = release.ask(token)
    if answer.status_code != 200:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status_code
    return answer.status_code


def test_missing_and_wrong_tokens(release: Release, token: str) -> None:
    assert _status(release, None) == 401
    assert _status(release, "t5_" + "x" * 40) == 401
    assert _status(release, token) == 200


def test_rotation_with_overlap_and_revocation(release: Release) -> None:
    first = release.tokens("create", "web-shop")
    until("the first token is known", lambda: release.always(first, 200), 120)

    second = release.tokens("rotate", "web-shop", "--overlap", "1h")
    until("the second token is known", lambda: release.always(second, 200), 120)
    assert release.always(first, 200)
    assert release.tokens("list").count("web-shop") == 2

    third = release.tokens("rotate", "web-shop", "--overlap", "5s")
    until("the third token is known", lambda: release.always(third, 200), 120)
    for old in (first, second):
        until("the overlap has ended", lambda old=old: release.always(old, 401), 120)  # type: ignore[misc]

    release.tokens("revoke", "web-shop")
    until("all are revoked", lambda: release.always(third, 401), 120)
    assert "web-shop" not in release.tokens("list")
