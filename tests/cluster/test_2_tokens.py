"""Tokens in the Secret, as clients meet them."""

from __future__ import annotations

import httpx

from tests.cluster.kube import until
from tests.cluster.load import TEXT
from tests.cluster.release import Release


def _status(release: Release, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    answer = httpx.post(
        f"{release.url}/v1/summarize", json={"text": TEXT}, headers=headers, timeout=60
    )
    if answer.status_code != 200:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status_code
    return answer.status_code


def _always(release: Release, token: str, status: int) -> bool:
    """Several times: there are two replicas, and each follows the Secret by itself."""
    return [_status(release, token) for _ in range(8)] == [status] * 8


def test_missing_and_wrong_tokens(release: Release, token: str) -> None:
    assert _status(release, None) == 401
    assert _status(release, "t5_" + "x" * 40) == 401
    assert until("the token is known", lambda: _always(release, token, 200), 120)


def test_rotation_with_overlap_and_revocation(release: Release) -> None:
    first = release.tokens("create", "web-shop")
    assert _status(release, first) in (200, 401)
    until("the first token is known", lambda: _always(release, first, 200), 120)

    second = release.tokens("rotate", "web-shop", "--overlap", "40s")
    until("the second token is known", lambda: _always(release, second, 200), 120)
    listed = release.tokens("list")
    assert listed.count("web-shop") == 2
    until("the first token has ended", lambda: _always(release, first, 401), 120)
    assert _always(release, second, 200)

    release.tokens("revoke", "web-shop")
    until("the second token is revoked", lambda: _always(release, second, 401), 120)
    assert "web-shop" not in release.tokens("list")
