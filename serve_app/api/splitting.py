"""Cut a long document on sentence boundaries into parts that fit the encoder."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import sentencex

from serve_app.engine.tokenizer import Encoded


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of characters."""

    start: int
    end: int


def sentences(text: str) -> list[Span]:
    """Spans of the sentences of `text`: contiguous, each with the white space that follows it.

    Pieces of white space alone are joined to the sentence before them.
    """
    spans: list[Span] = []
    for boundary in sentencex.get_sentence_boundaries("en", text):
        start, end = boundary["start_index"], boundary["end_index"]
        if spans and not text[start:end].strip():
            spans[-1] = Span(spans[-1].start, end)
        elif end > start:
            spans.append(Span(start, end))
    return spans


def split(text: str, encoded: Encoded, budget: int) -> list[Span]:
    """Cut `text` into the fewest parts of at most `budget` tokens each, of about equal length.

    A sentence longer than the budget is cut between tokens, after white space where it has any.

    Args:
        text: the document.
        encoded: its tokens, with offsets into `text`.
        budget: most tokens in a part, special tokens not counted.

    Returns:
        Spans in order; they overlap nowhere and leave out nothing but white space.
    """
    starts = [start for start, _ in encoded.offsets]

    def tokens(span: Span) -> int:
        return bisect_left(starts, span.end) - bisect_left(starts, span.start)

    pieces: list[tuple[Span, int]] = []
    for sentence in sentences(text):
        count = tokens(sentence)
        if count <= budget:
            pieces.append((sentence, count))
        else:
            cut = _cut(text, sentence, starts, budget)
            pieces.extend((piece, tokens(piece)) for piece in cut)

    # The fewest parts come from filling each to the budget; the last would be a stub. The
    # smallest cap that still gives as few parts makes them even.
    fewest = len(_pack(pieces, budget))
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_pack(pieces, middle)) > fewest:
            low = middle + 1
        else:
            high = middle
    return [
        _strip(text, span) for span in _pack(pieces, high) if text[span.start : span.end].strip()
    ]


def _pack(pieces: list[tuple[Span, int]], cap: int) -> list[Span]:
    parts: list[Span] = []
    used = 0
    for span, count in pieces:
        if parts and used + count <= cap:
            parts[-1] = Span(parts[-1].start, span.end)
            used += count
        else:
            parts.append(span)
            used = count
    return parts


def _cut(text: str, sentence: Span, starts: list[int], budget: int) -> list[Span]:
    """Cut one over-long sentence every `budget` tokens or a little earlier, at white space."""
    pieces: list[Span] = []
    begin = sentence.start
    last = bisect_left(starts, sentence.end)
    token = bisect_left(starts, begin)
    while last - token > budget:
        at = token + budget
        # Look back over the last quarter for a token that begins a word.
        for candidate in range(at, at - budget // 4, -1):
            position = starts[candidate]
            if text[position].isspace() or text[position - 1].isspace():
                at = candidate
                break
        end = starts[at]
        if end <= begin:  # several tokens of one character (byte fallback): step past it
            at = bisect_left(starts, begin + 1)
            end = starts[at] if at < len(starts) else sentence.end
        pieces.append(Span(begin, end))
        begin, token = end, at
    pieces.append(Span(begin, sentence.end))
    return pieces


def _strip(text: str, span: Span) -> Span:
    part = text[span.start : span.end]
    start = span.start + len(part) - len(part.lstrip())
    return Span(start, start + len(part.strip()))
