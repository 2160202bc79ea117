"""What a step of the machine's clock changes: expiry of tokens, and nothing else."""

from __future__ import annotations

import ast
import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import serve_app
from serve_app.api.limiter import RateLimiter
from serve_app.config import RateLimitSettings
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.errors import RateLimitedError
from serve_app.tokens import TokenStore, create
from tests.texts import texts
from tests.unit.local import local_app

DAY = timedelta(days=1)
# What serves requests asks the clock for these alone; all other times are monotonic.
ASK_THE_CLOCK = {
    "tokens.py",  # dates of expiry
    "usage/events.py",  # when an answer ended
    "usage/folder.py",  # names of segments
    "tracing/replica.py",  # times of spans
    "drain.py",  # Ray takes the deadline of a drain so
}
Step = Callable[[timedelta], None]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    """Steps the clock for whatever asks it in Python; the monotonic one goes on."""
    real, real_ns = time.time, time.time_ns

    def to(by: timedelta) -> None:
        class Stepped(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
                return datetime.now(UTC) + by

        monkeypatch.setattr(time, "time", lambda: real() + by.total_seconds())
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + by.days * 86_400 * 10**9)
        for module in ("tokens", "usage.events", "usage.folder"):
            monkeypatch.setattr(f"serve_app.{module}.datetime", Stepped)

    return to


def test_nothing_else_asks_the_clock() -> None:
    root = Path(serve_app.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if name.startswith(("cli/", "tuning/")):  # no part of what answers requests
            continue
        asked = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        if asked & {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}:
            found.add(name)
    # `secret_tokens.py` is a command.
    assert found - {"secret_tokens.py"} == ASK_THE_CLOCK


def test_tokens_expire_by_the_clock(tmp_path: Path, step: Step) -> None:
    path = tmp_path / "tokens.json"
    _, brief = create(path, "brief", timedelta(hours=1))
    _, steady = create(path, "steady", None)
    store = TokenStore(path)
    for by, known in ((timedelta(0), "brief"), (DAY, None), (-DAY, "brief")):
        step(by)
        assert (store.verify(brief), store.verify(steady)) == (known, "steady")


@pytest.mark.parametrize("by", [DAY, -DAY])
def test_a_bucket_fills_by_the_monotonic_clock(step: Step, by: timedelta) -> None:
    limits = RateLimiter(
        RateLimitSettings(enabled=True, tokens_per_minute=1, burst_tokens=1_000_000)
    )

    def take() -> None:
        turn = limits.turn("shop")
        assert turn is not None
        turn.enter()
        turn.take(1_000_000)
        turn.leave(1_000_000)

    take()
    step(by)
    with pytest.raises(RateLimitedError) as refused:
        take()
    # A token a minute, and as many as it took are missing: a day of it would tell.
    assert int(refused.value.headers["Retry-After"]) > 59_000_000


@pytest.mark.anyio
@pytest.mark.parametrize("by", [DAY, -DAY])
async def test_a_request_ends_at_its_deadline_neither_before_nor_after(
    checkpoint: Checkpoint, step: Step, by: timedelta
) -> None:
    client = EngineClient(lambda emit: ContinuousEngine(checkpoint, emit, threads=1))
    endless = 100_000
    body = {"text": texts(1)[0], "min_new_tokens": endless, "max_new_tokens": endless}
    began = time.monotonic()
    try:
        async with local_app(checkpoint, client, limits={"max_new_tokens": endless}) as local:
            sent = asyncio.create_task(
                local.http.post("/v1/summarize", json={**body, "timeout_s": 3})
            )
            while not (client.load().running_requests or sent.done()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            step(by)
            answer = await sent
    finally:
        client.close()
    assert answer.status_code == 408
    assert time.monotonic() - began >= 3
