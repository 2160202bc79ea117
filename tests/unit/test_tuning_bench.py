"""`t5-serve bench` against servers of known behaviour."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientSession, web

from serve_app.tuning.measured import Spread, measure
from serve_app.tuning.progress import seen
from serve_app.tuning.send import Run, Sent, Target, send
from serve_app.tuning.texts import Bodies, TextFileError, made_up, of_characters, read_texts

ROOT = Path(__file__).resolve().parents[2]
STALL_S, EVERY_S = 1.0, 5.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(answer: Handler) -> AsyncIterator[str]:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await answer(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


def target(url: str, timeout_s: float = 30, most: int = 1_000) -> Target:
    return Target(url, {}, timeout_s, most, trust_env=False)


async def sent(url: str, due: list[float], **more: Any) -> Run:
    run = Run()
    await send(due, lambda _: b"{}", target(url, **more), run, asyncio.Event())
    return run


def stalling() -> Handler:
    """Answers at once, but for the first second of every five."""
    begin = time.perf_counter()

    async def handler(request: web.Request) -> web.StreamResponse:
        phase = (time.perf_counter() - begin) % EVERY_S
        if phase < STALL_S:
            await asyncio.sleep(STALL_S - phase)
        return web.Response()

    return handler


def test_a_stall_shows_in_the_percentiles_which_a_closed_loop_would_hide() -> None:
    """At even arrivals a fifth of all requests meets a stall: the p99 is 1 s less 1/20 of it."""

    async def both() -> tuple[Spread, float]:
        async with served(stalling()) as url:
            run = await sent(url, [at / 40 for at in range(10 * 40)])
            open_loop = measure(run, 10, 2, 0.1).latency
        async with served(stalling()) as url, ClientSession() as session:
            closed: list[float] = []
            begin = time.perf_counter()
            while time.perf_counter() - begin < 2 * EVERY_S:
                asked = time.perf_counter()
                async with session.post(url):
                    closed.append(time.perf_counter() - asked)
            return open_loop, float(np.percentile(closed, 99))

    open_loop, closed = asyncio.run(both())
    assert open_loop.quantiles["p99"] is not None
    assert open_loop.quantiles["p99"] > 0.9 * STALL_S
    assert closed < 0.5 * STALL_S


def test_a_generator_that_is_late_itself_has_its_lag_within_the_latency() -> None:
    async def go() -> Run:
        async def handler(request: web.Request) -> web.StreamResponse:
            return web.Response()

        async with served(handler) as url:

            def body(number: int) -> bytes:
                if number == 0:
                    time.sleep(0.5)  # what a busy machine does
                return b""

            run = Run()
            await send([0.0, 0.1, 0.2], body, target(url), run, asyncio.Event())
            return run

    run = asyncio.run(go())
    figures = measure(run, 1, 0.25, 0.1)
    assert run.sent[1].began - run.sent[1].due > 0.35
    assert run.sent[1].latency_s > 0.35
    assert figures.missed is not None
    assert "3 of 3 requests were begun over 0.1 s late" in figures.missed
    assert figures.attainment == 0


def test_errors_are_told_by_kind_and_only_successes_have_latencies() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        number = int(await request.text())
        if number == 1:
            body = {"title": "Queue full\x1b[2J", "status": 503}
            return web.json_response(body, status=503)
        if number == 2:
            return web.Response(status=500, text="<html>")
        if number == 6:
            raise web.HTTPFound("/elsewhere")
        if number == 3:
            await asyncio.sleep(30)
        if number == 4 and request.transport is not None:
            request.transport.close()
        return web.Response()

    async def go() -> Run:
        async with served(handler) as url:
            run = Run()
            body = lambda number: str(number).encode()  # noqa: E731
            await send([0.0] * 7, body, target(url, timeout_s=1), run, asyncio.Event())
            return run

    figures = measure(asyncio.run(go()), 1, 2, 10)
    assert figures.errors == {
        "503 Queue full[2J": 1,
        "500": 1,
        "timeout": 1,
        "302": 1,
        "connection closed without an answer": 1,
    }
    assert (figures.succeeded, figures.latency.count, figures.failed_latency.count) == (2, 2, 5)
    assert figures.attainment == pytest.approx(2 / 7)


def test_a_service_that_is_not_there_is_an_error_of_each_request() -> None:
    figures = measure(asyncio.run(sent("http://127.0.0.1:1/", [0.0, 0.0])), 1, 2, 10)
    assert figures.errors == {"cannot connect: Connection refused": 2}
    assert figures.latency.mean is None


def test_beyond_the_bound_in_flight_requests_are_counted_not_sent() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(1)
        return web.Response()

    async def go() -> Run:
        async with served(handler) as url:
            return await sent(url, [0.0] * 10, most=4)

    figures = measure(asyncio.run(go()), 1, 2, 10)
    assert (figures.planned, figures.sent, figures.dropped) == (10, 4, 6)
    assert figures.missed == "6 were not sent, because too many were in flight"


def test_percentiles_goodput_and_attainment_are_what_they_are_called() -> None:
    run = Run(
        [Sent(at / 10, at / 10, at / 10 + (at + 1) / 100, "") for at in range(100)], wall_s=10.0
    )
    run.sent.append(Sent(9.99, 9.99))  # given up
    figures = measure(run, 10, 0.5, 0.1)
    assert figures.latency.quantiles == pytest.approx(
        {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 1.0}
    )
    assert figures.latency.mean == pytest.approx(0.505)
    assert figures.goodput == pytest.approx(5.0)
    assert figures.attainment == pytest.approx(0.5)
    assert (figures.unfinished, figures.missed) == (1, None)


def test_texts_have_their_length_and_their_seed() -> None:
    rng = np.random.default_rng(1)
    assert len(made_up(37, rng).split()) == 37
    assert len(of_characters(1_000, rng)) == 1_000
    sizes, beams = np.array([5, 9]), np.array([0, 4])
    first = [json.loads(Bodies(3, None, sizes, beams, {"max_new_tokens": 8})(n)) for n in range(3)]
    again = [json.loads(Bodies(3, None, sizes, beams, {"max_new_tokens": 8})(n)) for n in range(3)]
    other = [json.loads(Bodies(4, None, sizes, beams, {})(n)) for n in range(3)]
    assert first == again
    assert first != other
    assert [len(one["text"].split()) for one in first] == [5, 9, 5]
    assert [one.get("num_beams") for one in first] == [None, 4, None]
    assert len({one["text"] for one in first}) == 3


def test_files_of_texts(tmp_path: Path) -> None:
    plain, lines = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("One.\n\nTwo.\n")
    lines.write_text('{"text": "A"}\n{"words": 3}\n')
    assert read_texts(plain) == ["One.", "Two."]
    with pytest.raises(TextFileError, match=r"texts\.jsonl:2: must be a JSON object with a `text`"):
        read_texts(lines)
    with pytest.raises(TextFileError, match="No such file"):
        read_texts(tmp_path / "none")


# The command


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "serve_app.cli.main", "bench", *args]


def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("T5_SERVE")}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "T5_SERVE_TOKENS_FILE": str(tmp_path / "tokens.json"),
    }


class Service:
    """Answers what it is asked with `status` after `wait_s`; remembers what it was asked."""

    def __init__(self, status: int = 200, wait_s: float = 0.0) -> None:
        self.status = status
        self.wait_s = wait_s
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        self.second = asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        authorization = request.headers.get("Authorization")
        self.asked.append((request.path, authorization, await request.json()))
        if len(self.asked) == 2:
            self.second.set()
        await asyncio.sleep(self.wait_s)
        return web.json_response({}, status=self.status)


def benched(
    tmp_path: Path, service: Service, *args: str, interrupt: bool = False
) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of a bench; with `interrupt`, of Ctrl-C at its 2nd request."""

    async def go() -> tuple[int | None, str, str]:
        async with served(service) as url:
            process = await asyncio.create_subprocess_exec(
                *command(url, *args),
                env=environment(tmp_path),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            if interrupt:
                await service.second.wait()
                process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
            return process.returncode, out.decode(), err.decode()

    return asyncio.run(go())


def test_the_command_sends_the_load_and_tells_it_three_ways(tmp_path: Path) -> None:
    service, html, token = Service(), tmp_path / "bench.html", tmp_path / "token"
    token.write_text("t5s_secret\n")
    load = ["--arrivals", "constant", "--rate", "20", "--duration", "1", "--beams", "4"]
    status, out, err = benched(
        tmp_path, service, *load, "--words", "12", "--token-file", str(token),
        "--html", str(html), "--json", "--max-lag", "30",
    )  # fmt: skip
    assert (status, err) == (0, "")
    figures = json.loads(out)
    assert (figures["sent"], figures["succeeded"], figures["missed"]) == (20, 20, None)
    assert figures["load"] == "constant arrivals, 20 requests a second for 1 s"
    path, authorization, body = service.asked[0]
    assert (path, authorization) == ("/v1/summarize", "Bearer t5s_secret")
    assert body["num_beams"] == 4
    assert len(body["text"].split()) == 12
    page = html.read_text()
    assert page.count("<svg") == 3
    assert "t5s_secret" not in page + out

    status, out, _ = benched(tmp_path, Service(429), *load, "--max-lag", "30")
    assert status == 0
    assert "failed, 429: 20" in out
    assert "0.00% of what was due" in out


def test_a_rate_that_was_not_sent_is_not_claimed(tmp_path: Path) -> None:
    status, out, err = benched(
        tmp_path, Service(wait_s=1.5), "--rate", "40", "--duration", "1", "--arrivals", "constant",
        "--max-in-flight", "3", "--max-lag", "30",
    )  # fmt: skip
    assert status == 1
    assert "37 were not sent, because too many were in flight" in err
    assert err.startswith("t5-serve: not the load that was asked for (40.00 requests a second): ")
    assert err.count("\n") == 1
    assert "sent 3 requests" in out


def test_ctrl_c_gives_the_report_of_what_was_sent(tmp_path: Path) -> None:
    status, out, err = benched(
        tmp_path, Service(wait_s=60), "--rate", "20", "--duration", "600", "--json", interrupt=True
    )
    assert status == 130, err
    figures = json.loads(out)
    assert figures["interrupted"] is True
    assert 2 <= figures["sent"] == figures["unfinished"] < 1_000


def test_a_load_ends_with_its_last_request_when_they_are_bounded(tmp_path: Path) -> None:
    service = Service()
    load = ["--arrivals", "constant", "--rate", "20", "--duration", "600", "--max-requests", "5"]
    status, out, _ = benched(tmp_path, service, *load, "--max-lag", "30", "--json")
    figures = json.loads(out)
    assert (status, figures["sent"], len(service.asked)) == (0, 5, 5)
    assert figures["seconds"] == pytest.approx(0.25)
    assert figures["planned_rate"] == pytest.approx(20)


def test_a_recorded_load_is_sent_as_it_came(tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    lines = [
        {
            "time": f"2026-11-23T08:00:{at * 10:02}Z",
            "message": "request",
            "request_id": str(at),
            "method": "POST",
            "total_ms": 5.0,
            "characters": 100 + at,
            "num_beams": 2,
        }
        for at in range(3)
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    service = Service()
    status, out, err = benched(
        tmp_path, service, "--arrivals", "trace", "--logs", str(log), "--speed", "50",
        "--max-lag", "30", "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert [len(body["text"]) for _, _, body in service.asked] == [100, 101, 102]
    assert {body["num_beams"] for _, _, body in service.asked} == {2}
    assert json.loads(out)["seconds"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ftp://x"], "ftp://x: must be an http or https URL"),
        (["http://x", "--words", "many"], "--words: must be one of constant:N"),
        (["http://x", "--beams", "0"], "--beams: needs beams of 1 and more"),
        (["http://x", "--arrivals", "diurnal", "--peak", "3"], "--peak: must be from 1 to 2, is 3"),
        (["http://x", "--token-file", "/none"], "/none: No such file or directory"),
        (["http://x", "--arrivals", "trace", "--logs", "/none"], "/none: no such file or folder"),
        (
            ["http://x", "--rate", "1e9"],
            "--rate times --duration: must be at most 10,000,000, is 60",
        ),
        (["http://x", "--rate", "0.00001"], "the load has no request; raise --rate or --duration"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    done = subprocess.run(
        command(*args), env=environment(tmp_path), capture_output=True, timeout=120
    )
    said = done.stderr.decode()
    assert done.returncode == 2, said
    assert said.startswith(f"t5-serve: {message}")
    assert said.count("\n") == 1


def test_the_progress_line_tells_the_latest_answers() -> None:
    run = Run([Sent(0, 0, 0.2, ""), Sent(0, 0, 0.4, ""), Sent(0, 0, 9, "timeout"), Sent(1, 1)])
    run.in_flight = 1
    said = "4 sent, 1 in flight, 1 of the last 3 failed, p50 400 ms, p99 400 ms"
    assert seen(run) == said
    assert seen(Run(dropped=2)) == "0 sent, 0 in flight, 2 not sent"
