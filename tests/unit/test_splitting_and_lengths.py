"""Splitting long documents, and keeping a growing text to a length."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.api.lengths import TextStream, trim
from serve_app.api.schemas import Length
from serve_app.api.splitting import sentences, split
from serve_app.engine.checkpoint import resolve
from serve_app.engine.tokenizer import Tokenizer
from tests.texts import long_text

TOKENIZER = Tokenizer(resolve("demo"))
DOCUMENT = long_text(1_200)

anything = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=400
).filter(lambda text: text.strip() != "")


def cut(text: str, budget: int) -> list[str]:
    spans = split(text, TOKENIZER.encode(text), budget)
    return [text[span.start : span.end] for span in spans]


@given(anything)
def test_sentences_leave_nothing_out(text: str) -> None:
    spans = sentences(text)
    assert spans[0].start == 0
    assert spans[-1].end == len(text)
    for left, right in pairwise(spans):
        assert left.end == right.start


@settings(max_examples=200)
@given(anything, st.integers(4, 60))
def test_parts_leave_out_nothing_but_white_space(text: str, budget: int) -> None:
    spans = split(text, TOKENIZER.encode(text), budget)
    end = 0
    for span in spans:
        assert text[end : span.start].strip() == ""
        assert span.start < span.end
        end = span.end
    assert text[end:].strip() == ""


@pytest.mark.parametrize("budget", [40, 100, 400])
def test_parts_fit_and_are_even(budget: int) -> None:
    counts = [len(TOKENIZER.encode(part).ids) for part in cut(DOCUMENT, budget)]
    # A part tokenized alone may gain a token or two at its edges.
    assert max(counts) <= budget + 3
    total = len(TOKENIZER.encode(DOCUMENT).ids)
    assert len(counts) >= total / budget
    assert len(counts) <= total / (budget / 2) + 1
    if budget == 400:
        assert min(counts) > max(counts) / 2  # no stub at the end


def test_parts_end_with_sentences() -> None:
    text = "The first one is here. The second follows it. A third ends the text."
    assert cut(text, 8) == [
        "The first one is here.",
        "The second follows it.",
        "A third ends the text.",
    ]


def test_a_sentence_longer_than_a_part_is_cut_at_white_space() -> None:
    words = [f"word{i}" for i in range(300)]
    text = " ".join(words)
    parts = cut(text, 50)
    assert [word for part in parts for word in part.split()] == words


def test_one_endless_word_is_cut_all_the_same() -> None:
    text = "ab" * 2_000
    parts = cut(text, 50)
    assert "".join(parts) == text
    assert all(len(TOKENIZER.encode(part).ids) <= 54 for part in parts)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ({"words": 2}, "One two"),
        ({"words": 3}, "One two three."),
        ({"words": 5}, "One two three."),
        ({"words": 6}, "One two three. Four five six!"),
        ({"words": 100}, "One two three. Four five six! Seven."),
        ({"sentences": 1}, "One two three."),
        ({"sentences": 2}, "One two three. Four five six!"),
        ({"sentences": 9}, "One two three. Four five six! Seven."),
    ],
)
def test_trim_keeps_whole_sentences_up_to_the_bound(length: dict[str, int], expected: str) -> None:
    assert trim("One two three. Four five six! Seven.", Length(**length)) == expected


@given(anything, st.integers(1, 20))
def test_trim_never_exceeds_the_words(text: str, words: int) -> None:
    kept = trim(text, Length(words=words))
    assert 1 <= len(kept.split()) <= words
    assert "".join(text.split()).startswith("".join(kept.split()))


@given(st.text(st.characters(codec="utf-8"), max_size=80), st.data())
def test_deltas_concatenate_to_the_decoded_text(text: str, data: st.DataObject) -> None:
    ids = TOKENIZER.encode(text).ids
    stream = TextStream(TOKENIZER.decode, None)
    said = ""
    rest = ids
    while rest:
        step = data.draw(st.integers(1, len(rest)))
        said += stream.push(rest[:step])
        assert "\ufffd" not in said or "\ufffd" in text
        rest = rest[step:]
    whole = TOKENIZER.decode(ids).strip()
    assert said + stream.finish(whole) == whole == stream.text


def test_a_length_holds_a_stream_back_until_a_sentence_is_whole() -> None:
    ids = TOKENIZER.encode("One two three. Four five six. Seven eight nine.").ids
    stream = TextStream(TOKENIZER.decode, Length(words=6))
    deltas = [delta for i in ids if (delta := stream.push([i]))]
    assert deltas[0] == "One two three."
    assert "".join(deltas) == "One two three. Four five six."
