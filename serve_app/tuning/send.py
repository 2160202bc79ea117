"""Sends a load as it was planned, whatever becomes of it: open loop, timed from the planned moment.

A client that waits for an answer before it sends the next request sends little while a server
stalls, and so hardly sees the stall (coordinated omission; Gil Tene, "How NOT to Measure Latency").
Here nothing waits for answers, and a latency begins when the request was due.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import aiohttp

OK, UNFINISHED = "", "unfinished"
_SPIN_S = 0.002  # asyncio's clock is that coarse
_KEPT = 65_536  # bytes of an answer


@dataclass(frozen=True)
class Target:
    """Where to and how. `headers` go with each request; `timeout_s` counts from the real send."""

    url: str
    headers: dict[str, str]
    timeout_s: float
    most_in_flight: int
    trust_env: bool = True


@dataclass(slots=True)
class Sent:
    """One request. Times in seconds since the load began; `kind` is empty when it succeeded."""

    due: float
    began: float
    ended: float = 0.0
    kind: str = UNFINISHED

    @property
    def latency_s(self) -> float:
        """From the moment it was due."""
        return self.ended - self.due


@dataclass
class Run:
    """What was sent so far."""

    sent: list[Sent] = field(default_factory=list)
    dropped: int = 0  # not sent: too many in flight
    in_flight: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    stopped: bool = False  # before the load's end


async def send(
    due: Iterable[float],
    body: Callable[[int], bytes],
    target: Target,
    run: Run,
    stop: asyncio.Event,
    answered: Callable[[int, bytes], None] | None = None,
) -> None:
    """Send one request at each moment of `due` (seconds from now) and wait for the answers.

    `run` is filled as it goes. When `stop` is set nothing more is sent, and what is in flight is
    given up and stays `UNFINISHED`. `answered` gets the number of each request that
    succeeded, as `body` did, and the beginning of its answer.
    """
    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    tasks: set[asyncio.Task[None]] = set()
    cpu, began = time.process_time(), time.perf_counter()
    stopping = asyncio.create_task(stop.wait())
    async with aiohttp.ClientSession(
        # A connection for each request in flight: a pool's limit would close the loop again.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        headers=target.headers,
        timeout=timeout,
        trust_env=target.trust_env,
        auto_decompress=False,
    ) as session:
        for number, moment in enumerate(due):
            if await _due(began + moment, stopping):
                run.stopped = True
                break
            if run.in_flight >= target.most_in_flight:
                run.dropped += 1
                continue
            one = Sent(moment, time.perf_counter() - began)
            run.sent.append(one)
            run.in_flight += 1
            told = partial(answered, number) if answered is not None else None
            task = asyncio.create_task(
                _request(session, target, body(number), one, began, run, told)
            )
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        run.wall_s = time.perf_counter() - began
        if tasks and not stopping.done():
            answers = asyncio.create_task(_all(tasks))
            await asyncio.wait([stopping, answers], return_when=asyncio.FIRST_COMPLETED)
            run.stopped = not answers.done()
            answers.cancel()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    stopping.cancel()
    run.wall_s = max(run.wall_s, 1e-9)
    run.cpu_s = time.process_time() - cpu


async def _all(tasks: Iterable[asyncio.Task[None]]) -> None:
    await asyncio.wait(list(tasks))


async def _due(moment: float, stopping: asyncio.Task[bool]) -> bool:
    """Wait for a moment of `perf_counter`. True when it is not to come any more."""
    while (left := moment - time.perf_counter()) > 0:
        if left > _SPIN_S:
            await asyncio.wait([stopping], timeout=left - _SPIN_S / 2)
        else:
            await asyncio.sleep(0)
        if stopping.done():
            return True
    # Late already: answers must get their turn all the same.
    await asyncio.sleep(0)
    return stopping.done()


async def _request(
    session: aiohttp.ClientSession,
    target: Target,
    body: bytes,
    one: Sent,
    began: float,
    run: Run,
    answered: Callable[[bytes], None] | None,
) -> None:
    try:
        one.began = time.perf_counter() - began
        kind, content = await _outcome(session, target, body)
        one.ended = time.perf_counter() - began
        one.kind = kind
        if kind == OK and answered is not None:
            answered(content)
    finally:
        run.in_flight -= 1


async def _outcome(
    session: aiohttp.ClientSession, target: Target, body: bytes
) -> tuple[str, bytes]:
    """Empty for success, else the kind of error; and what is kept of the answer."""
    content = bytearray()
    try:
        async with session.post(target.url, data=body, allow_redirects=False) as response:
            async for piece in response.content.iter_any():
                if len(content) < _KEPT:
                    content += piece
            failed = response.status >= 300
            kind = _problem(response.status, bytes(content)) if failed else OK
    except TimeoutError:
        kind = "timeout"
    except aiohttp.ClientConnectorError as error:
        kind = f"cannot connect: {_reason(error.os_error)}"
    except aiohttp.ServerDisconnectedError:
        kind = "connection closed without an answer"
    except aiohttp.ClientPayloadError:
        kind = "connection closed within the answer"
    except (aiohttp.ClientError, OSError) as error:
        kind = type(error).__name__
    return kind, bytes(content)


def _reason(error: OSError) -> str:
    # asyncio's own text has the address in it, which makes a kind of each request.
    return os.strerror(error.errno) if error.errno and error.errno > 0 else "no such host"


def _problem(status: int, content: bytes) -> str:
    """`503 Queue full`: the status, and the title of a problem document (RFC 9457)."""
    try:
        title = json.loads(content)["title"]
    except (ValueError, KeyError, TypeError):
        return str(status)
    shown = "".join(one for one in str(title)[:60] if one.isprintable())
    return f"{status} {shown}"
