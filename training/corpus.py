"""Tokens of all training texts in one file, `corpus.npz`; `training.prepare` makes it.

Ragged arrays: all sentences' tokens one after another, and where each sentence and text begins. A
training machine needs this file and nothing else of the data, and reads it in a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training import WORK

CORPUS = WORK / "corpus.npz"
# By how much the first sentence of a text, or of a part of one, stands for it more than others do.
LEAD = 0.25
TEXTS = ("descriptions", "synopses", "passages", "dev_descriptions", "dev_synopses")


@dataclass(frozen=True, slots=True)
class Texts:
    """Ragged texts of `len(first) - 1` documents.

    Attributes:
        tokens: (tokens,) uint16, of all sentences one after another.
        ends: (sentences + 1,) int64, where each sentence's tokens begin, and the end.
        first: (documents + 1,) int64, each document's first sentence, and the end.
    """

    tokens: NDArray[np.uint16]
    ends: NDArray[np.int64]
    first: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first) - 1

    def sentences(self, index: int) -> range:
        """The sentences of a document."""
        return range(int(self.first[index]), int(self.first[index + 1]))

    def span(self, begin: int, end: int) -> NDArray[np.uint16]:
        """Tokens of the sentences from `begin` up to `end`."""
        return self.tokens[self.ends[begin] : self.ends[end]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """All that is trained on.

    Attributes:
        descriptions, synopses: alike in number; a synopsis is one sentence.
        faithful: (descriptions,) float32, share of a synopsis's content words that its text has.
        passages: prose.
        gist: (sentences of the passages,) float32, how well each stands for its passage.
        weight: (passages,) float32, how often to ask for one's gist; 0 is never.
        dev_descriptions, dev_synopses: held out.
        prefix, copy_prefix: tokens of the two tasks' prefixes.
    """

    descriptions: Texts
    synopses: Texts
    faithful: NDArray[np.float32]
    passages: Texts
    gist: NDArray[np.float32]
    weight: NDArray[np.float32]
    dev_descriptions: Texts
    dev_synopses: Texts
    prefix: NDArray[np.uint16]
    copy_prefix: NDArray[np.uint16]
    vocabulary: int


def save(corpus: Corpus, path: Path = CORPUS) -> None:
    """Write the arrays."""
    arrays: dict[str, object] = {}
    for name in Corpus.__slots__:
        value = getattr(corpus, name)
        if isinstance(value, Texts):
            arrays |= {f"{name}.{part}": getattr(value, part) for part in Texts.__slots__}
        else:
            arrays[name] = value
    np.savez_compressed(path, **arrays)


def read(path: Path = CORPUS) -> Corpus:
    """What `save` has written."""
    with np.load(path) as arrays:
        texts = {n: Texts(*(arrays[f"{n}.{p}"] for p in Texts.__slots__)) for n in TEXTS}
        rest = {n: arrays[n] for n in ("faithful", "gist", "weight", "prefix", "copy_prefix")}
        return Corpus(**texts, **rest, vocabulary=int(arrays["vocabulary"]))
