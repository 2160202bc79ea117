"""Reading logs: whatever bytes are in them, good lines are read and bad ones counted."""

from __future__ import annotations

import gzip
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.usage.reader import Line, Tally, UsageReadError, read_files, read_stream
from serve_app.usage.views import REPORTS, Usage

GOOD = {
    "time": "2026-11-23T10:00:00.000Z",
    "message": "request",
    "request_id": "r",
    "route": "/v1/summarize",
    "status": 200,
}


def good(**more: Any) -> bytes:
    return json.dumps({**GOOD, **more}).encode() + b"\n"


def read(content: bytes) -> tuple[list[Line], Tally]:
    tally = Tally()
    stream = io.BufferedReader(io.BytesIO(content))
    return list(read_stream(stream, "x", tally)), tally


def test_a_line_is_its_time_and_the_rest() -> None:
    [line], tally = read(good(client="café", list=["x"], none=None))
    assert line.time == datetime(2026, 11, 23, 10, tzinfo=UTC)
    kept = {key: value for key, value in GOOD.items() if key != "time"}
    assert json.loads(line.payload) == {**kept, "client": "café"}
    assert (tally.lines, tally.ignored, tally.broken_lines) == (1, 0, 0)


@pytest.mark.parametrize(
    "time", ["2026-11-23T10:00:00Z", "2026-11-23T10:00:00+0000", "2026-11-23T12:00:00.0+02:00"]
)
def test_times_of_all_our_logs(time: str) -> None:
    [line], _ = read(good(time=time))
    assert line.time == datetime(2026, 11, 23, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (good()[:40], "not JSON"),
        (b'{"status":000}', "not JSON"),
        (good(request_id=None), "no request_id"),
        (good(request_id=7), "no request_id"),
        (good(time=None), "no time"),
        (good(time="yesterday"), "no time"),
        (good(time=12), "no time"),
        (good(total_ms=float("nan")), "not JSON in UTF-8"),
        (good(client="\ud800"), "not JSON in UTF-8"),
    ],
)
def test_a_broken_line_is_counted_and_told(line: bytes, reason: str) -> None:
    lines, tally = read(good() + line.rstrip(b"\n") + b"\n" + good())
    assert len(lines) == 2
    assert (tally.broken_lines, tally.broken) == (1, [f"x:2: {reason}"])


@pytest.mark.parametrize(
    "line", [b"10.0.0.1 - - GET /", b"", b"[]", b'{"message": "engine ready"}', b"null", b"17"]
)
def test_lines_of_others_are_passed_over(line: bytes) -> None:
    lines, tally = read(line + b"\n" + good())
    assert len(lines) == 1
    assert (tally.ignored, tally.broken_lines) == (1, 0)


def test_only_the_first_broken_lines_are_told_and_all_counted() -> None:
    _, tally = read(b"{\n" * 1000)
    assert tally.broken_lines == 1000
    assert len(tally.broken) == 5


def test_gzip_by_its_bytes_and_cut_off(tmp_path: Path) -> None:
    packed = gzip.compress(good() * 1000)
    assert len(read(packed)[0]) == 1000
    lines, tally = read(packed[:-20])
    assert tally.broken_lines == 1
    assert "gzip" in tally.broken[0]
    assert 0 < len(lines) <= 1000


def test_a_folder_gives_its_logs_and_nothing_else(tmp_path: Path) -> None:
    names = ("usage-1.jsonl", "access.log", "access.log.1", "access.log.2.gz", "lines.json")
    for name in names:
        content = gzip.compress(good()) if name.endswith(".gz") else good()
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tail.checkpoint").write_text("{}")
    (tmp_path / "notes.txt").write_bytes(good())
    tally = Tally()
    assert len(list(read_files([tmp_path], tally))) == tally.files == len(names)


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "x", "no such file"), (tmp_path, "no logs in this folder")):
        with pytest.raises(UsageReadError, match=said):
            list(read_files([path], Tally()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
MUTATED = st.fixed_dictionaries(
    dict.fromkeys(("time", "message", "request_id"), st.text() | JSON),
    optional=dict.fromkeys(("status", "client", "route", "total_ms", "truncated"), JSON),
).map(lambda line: json.dumps({**line, "message": "request"}).encode())
NOISE = st.binary(max_size=60).map(lambda piece: piece.replace(b"\n", b""))
CUT = st.integers(0, len(good()) - 2).map(lambda at: good()[:at])


@settings(max_examples=300, deadline=None)
@given(st.lists(NOISE | CUT | MUTATED, max_size=8))
def test_no_bytes_break_the_reader_and_good_lines_come_through(noise: list[bytes]) -> None:
    content = b"".join(piece + b"\n" + good(request_id=f"r{i}") for i, piece in enumerate(noise))
    # Bytes that begin as gzip does are gzip: a good line goes first.
    lines, tally = read(good(request_id="first") + content)
    ids = [json.loads(line.payload)["request_id"] for line in lines]
    wanted = ["first", *(f"r{i}" for i in range(len(noise)))]
    assert [one for one in ids if one in wanted] == wanted
    # Empty lines are no lines; each other one is of exactly one kind.
    blank = sum(1 for piece in noise if not piece)
    total = 1 + 2 * len(noise)
    assert total - blank <= tally.lines + tally.ignored + tally.broken_lines <= total


@settings(max_examples=15, deadline=None)
@given(st.lists(MUTATED, min_size=20, max_size=40))
@example([b'{"message": "request", "status": 9.223372036854788e+18, "total_ms": 1e308}'])
def test_no_values_break_the_views(lines: list[bytes]) -> None:
    fixed = [
        json.dumps({**json.loads(line), "time": GOOD["time"], "request_id": f"r{number}"}).encode()
        for number, line in enumerate(lines)
    ]
    stream = io.BufferedReader(io.BytesIO(b"\n".join([*fixed, good()])))
    usage = Usage(read_stream(stream, "x", Tally()))
    for name in REPORTS:
        usage.report(name)
    assert usage.report("overview").rows
    usage.arrivals()
