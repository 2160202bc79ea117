"""Summary text as it grows: decoding token by token, and keeping to a length."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from serve_app.api.schemas import Length
from serve_app.api.splitting import sentences

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of half a UTF-8 character


def trim(text: str, length: Length, *, final: bool = True) -> str:
    """The whole sentences at the start of `text` that keep to `length`.

    When not even the first sentence does, its first words. With `final` false, `text` is still
    growing: its last sentence may not be complete, and is left out.
    """
    spans = sentences(text)
    whole = spans if final else spans[:-1]
    if length.sentences is not None:
        kept = whole[: length.sentences]
        return text[: kept[-1].end].rstrip() if kept else ""
    words = length.words or 0
    kept_to = 0
    for span in whole:
        if len(text[: span.end].split()) > words:
            break
        kept_to = span.end
    if kept_to or not final:
        return text[:kept_to].rstrip()
    return " ".join(text.split()[:words])


class TextStream:
    """Turns growing token ids into text deltas that concatenate to the summary."""

    def __init__(self, decode: Callable[[list[int]], str], length: Length | None) -> None:
        self._decode = decode
        self._length = length
        self._ids: list[int] = []
        self._sent = ""

    def push(self, ids: Iterable[int]) -> str:
        """The text that is settled now that `ids` have come; may be empty."""
        self._ids.extend(ids)
        # White space at the end is settled only by what follows it.
        text = self._decode(self._ids).rstrip(_UNFINISHED).strip()
        if self._length is not None:
            text = trim(text, self._length, final=False)
        return self._advance(text)

    def finish(self, summary: str) -> str:
        """What is missing from the deltas so far to make them `summary`."""
        return self._advance(summary)

    @property
    def text(self) -> str:
        """All deltas so far."""
        return self._sent

    def _advance(self, text: str) -> str:
        # A sentence boundary can move when more text follows. What was sent stays sent.
        if not text.startswith(self._sent):
            return ""
        delta = text[len(self._sent) :]
        self._sent = text
        return delta
