"""Texts to send: made up to a length, or lines of a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from serve_app.tuning.sizes import Ints

# Common words and function words in turn: a tokenizer makes about one token of each.
_TEXT = (
    "the server keeps a small queue of requests and answers each of them when a worker is free "
    "while other programs read data from the network and write their results to a file that "
    "people can search later with tools of many kinds for work at home or in an office"
)
_WORDS = tuple(_TEXT.split())
_SENTENCE = 14  # words


class TextFileError(Exception):
    """A file of texts cannot be used; the message says which and why, in one line."""


def made_up(words: int, rng: np.random.Generator) -> str:
    """So many words in sentences, of a seed: no two texts alike, as no cache should answer."""
    chosen = [_WORDS[at] for at in rng.integers(0, len(_WORDS), words)]
    for at in range(_SENTENCE - 1, words, _SENTENCE):
        chosen[at] += "."
    return " ".join(chosen)


def of_characters(characters: int, rng: np.random.Generator) -> str:
    """Such a text of so many characters."""
    mean = sum(map(len, _WORDS)) / len(_WORDS) + 1
    text = made_up(int(characters / mean * 1.2) + 8, rng)
    return text[:characters].ljust(characters, "s")


def read_texts(path: Path) -> list[str]:
    """A text per line; where the file's name ends in `.jsonl`, its `text`.

    Raises:
        TextFileError: cannot be read, or has no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TextFileError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TextFileError(f"{path}: not UTF-8 text at byte {error.start}") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            texts.append(line)
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise TextFileError(f"{path}:{number}: must be a JSON object with a `text`")
        texts.append(text)
    if not texts:
        raise TextFileError(f"{path}: no texts")
    return texts


class Bodies:
    """The body of each request, made when it is asked for, the same for the same seed.

    Args:
        texts: take one of them for each request; else make texts of `sizes`.
        sizes: words of the n-th text, or characters where `characters` is true; in turn again
            where there are more requests.
        beams: beam width of the n-th request, likewise; 0: do not ask for one.
        more: what else each body has.
    """

    def __init__(
        self,
        seed: int,
        texts: list[str] | None,
        sizes: Ints,
        beams: Ints,
        more: dict[str, object],
        characters: bool = False,
    ) -> None:
        self._seed = seed
        self._texts = texts
        self._sizes = sizes
        self._beams = beams
        self._more = more
        self._make = of_characters if characters else made_up

    def __call__(self, number: int) -> bytes:
        """The body of the n-th request."""
        rng = np.random.default_rng([self._seed, number])
        if self._texts is not None:
            text = self._texts[int(rng.integers(len(self._texts)))]
        else:
            text = self._make(int(self._sizes[number % len(self._sizes)]), rng)
        body: dict[str, object] = {"text": text, **self._more}
        if beams := int(self._beams[number % len(self._beams)]):
            body["num_beams"] = beams
        return json.dumps(body, ensure_ascii=False).encode()
