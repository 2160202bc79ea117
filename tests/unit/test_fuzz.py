"""Any input at all: splitting, the tokens file, the usage log, a stream as the client reads it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.api.splitting import split
from serve_app.cli.errors import CliError
from serve_app.cli.summarize import _streamed
from serve_app.engine.checkpoint import resolve
from serve_app.engine.tokenizer import Tokenizer
from serve_app.tokens import TokenFileError, TokenStore, parse
from serve_app.usage.reader import Tally, read_stream

bounded = settings(
    derandomize=True,
    max_examples=150,
    deadline=None,  # machines stall
    suppress_health_check=[HealthCheck.too_slow],
)

# ---- splitting ----

TOKENIZER = Tokenizer(resolve("demo"))
PLANES = st.integers(0, 16).flatmap(
    lambda plane: st.characters(
        min_codepoint=max(plane << 16, 1),
        max_codepoint=(plane << 16) + 0xFFFF,
        exclude_categories=["Cs"],
    )
)
# Joiners, marks that reorder or combine, and what ends sentences in several scripts.
AWKWARD = st.sampled_from(
    "\u200d\ufe0f\u202e\u0301\u0fd3\u3099.!?。؟।\n\r\x85\u2028\ufeff\U000e0001"
)
TEXT = st.text(PLANES | AWKWARD | st.sampled_from("ab "), min_size=1, max_size=300).filter(
    str.strip
)


@bounded
@given(TEXT, st.integers(2, 64))
def test_splitting_loses_nothing_of_any_plane(text: str, budget: int) -> None:
    encoded = TOKENIZER.encode(text)
    end = 0
    for span in split(text, encoded, budget):
        assert text[end : span.start].strip() == ""
        part = text[span.start : span.end]
        assert part
        assert part == part.strip()
        # Tokens that begin in a part; several may be of one character, which nothing can cut.
        inside = [start for start, _ in encoded.offsets if span.start <= start < span.end]
        assert len(inside) <= budget or len(set(inside)) == 1
        end = span.end
    assert text[end:].strip() == ""


# ---- tokens file ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
RECORD = st.fixed_dictionaries(
    {
        "id": st.just("0a1b2c3d") | JSON,
        "client": st.just("shop") | JSON,
        "sha256": st.just("0" * 64) | JSON,
        "created": st.just("2026-01-01T00:00:00Z") | st.text(max_size=25) | JSON,
        "expires": st.none() | JSON,
    },
    optional={"colour\nof it": JSON},
)
FILE = st.fixed_dictionaries({"version": st.just(1) | JSON, "tokens": st.lists(RECORD) | JSON})
CONTENT = st.binary(max_size=200) | (FILE | JSON).map(lambda value: json.dumps(value).encode())


def complaint(content: bytes) -> str | None:
    try:
        parse("tokens.json", content)
    except TokenFileError as error:
        return str(error)
    return None


@bounded
@given(CONTENT, st.text(max_size=40))
def test_any_tokens_file_is_read_or_told_in_one_line(content: bytes, token: str) -> None:
    said = complaint(content)
    assert said is None or re.fullmatch(r"tokens\.json: [^\r\n]+", said), said
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.json"
        path.write_bytes(content)
        assert TokenStore(path).verify(token) is None


# ---- usage log ----


def lines_of(content: bytes) -> tuple[int, Tally]:
    tally = Tally()
    read = list(read_stream(io.BufferedReader(io.BytesIO(content)), "x", tally))
    return len(read), tally


@bounded
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_of_a_usage_log_are_counted(content: bytes, packed: bool) -> None:
    # Without gzip's own first bytes, which would make it another file.
    content = b" " + content.replace(b"\x1f\x8b", b"")
    count, tally = lines_of(gzip.compress(content) if packed else content)
    assert count == tally.lines
    met = io.BytesIO(content).readlines()
    assert tally.lines + tally.ignored + tally.broken_lines == len(met)


@bounded
@given(st.binary(max_size=200), st.integers(0, 30))
def test_any_damage_to_a_packed_usage_log_is_told(noise: bytes, at: int) -> None:
    packed = gzip.compress(b'{"message": "request"}\n' * 9)
    _, tally = lines_of(packed[: 2 + at] + noise)
    assert tally.files == 1
    # Each line of it is one that should be an event and is not; the damage is one more.
    assert tally.broken_lines >= 1


# ---- server-sent events ----

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LINE_BREAKS = st.sampled_from(["\n", "\r\n", "\r"])


@st.composite
def cut(draw: st.DrawFn, content: bytes) -> list[bytes]:
    at = sorted(draw(st.sets(st.integers(0, len(content)), max_size=30)))
    return [content[a:b] for a, b in zip([0, *at], [*at, len(content)], strict=True)]


class Pieces(httpx.SyncByteStream):
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces


def read(pieces: list[bytes]) -> tuple[Any, str]:
    """What `t5-serve summarize` makes of a stream: the answer, and what it printed."""
    headers = {"Content-Type": "text/event-stream"}
    transport = httpx.MockTransport(
        lambda _request: httpx.Response(200, headers=headers, stream=Pieces(pieces))
    )
    printed = io.StringIO()
    with httpx.Client(transport=transport) as client, contextlib.redirect_stdout(printed):
        answer = _streamed(client, "http://service/v1/summarize", {}, True)
    return answer, printed.getvalue()


@bounded
@given(st.data(), st.lists(WORDS, max_size=6), LINE_BREAKS)
def test_any_cutting_of_a_stream_gives_the_same_events(
    data: st.DataObject, deltas: list[str], line_break: str
) -> None:
    answer = {"summary": "".join(deltas), "truncated": False}
    events = [("start", {"chunks": 1}), *(("delta", {"text": text}) for text in deltas)]
    frames = [": ping"]
    for name, content in [*events, ("done", answer)]:
        body = json.dumps(content, ensure_ascii=False)
        frames.append(f"event: {name}{line_break}data: {body}{line_break}")
    stream = line_break.join([*frames, ""]).encode()
    got, printed = read(data.draw(cut(stream)))
    assert got == answer
    # One line break ends what was printed; text streams have their own idea of the others.
    assert printed == "".join(deltas) + ("\n" if deltas else "")


@bounded
@given(
    st.lists(
        st.binary(max_size=60)
        | st.tuples(st.sampled_from(["start", "chunk", "delta", "done", "error"]), JSON).map(
            lambda one: f"event: {one[0]}\ndata: {json.dumps(one[1])}\n\n".encode()
        ),
        max_size=5,
    )
)
def test_any_stream_ends_in_an_answer_or_a_command_line_error(pieces: list[bytes]) -> None:
    with contextlib.suppress(CliError):
        answer, _ = read(pieces)
        assert {"summary", "truncated"} <= answer.keys()


def test_a_stream_that_is_none_is_told() -> None:
    for pieces in ([], [b"event: done\n"], [b"event: done\ndata: 1\n\n"], [b"\xff\xfe"]):
        with pytest.raises(CliError):
            read(pieces)
