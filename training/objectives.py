"""What the model is asked to do with an example, as pairs of token ids."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tokenizers import Tokenizer

from training import COPY_PREFIX, PREFIX
from training.data import Example

EOS = 1
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")


@dataclass(frozen=True, slots=True)
class Pair:
    """Encoder input and decoder target, both ending in the end token."""

    source: list[int]
    target: list[int]


class Objectives:
    """Turns examples into pairs.

    Args:
        tokenizer: the demo model's.
        max_source: encoder tokens at most; longer sources are cut.
        max_target: decoder tokens at most.
    """

    def __init__(self, tokenizer: Tokenizer, max_source: int, max_target: int = 64) -> None:
        self._tokenizer = tokenizer
        self._max_source = max_source
        self._max_target = max_target

    def synopsis(self, example: Example) -> Pair:
        """The task itself: the whole description, its synopsis."""
        return self._pair(PREFIX + example.text, example.synopsis)

    def copy(self, example: Example, rng: random.Random) -> Pair:
        """Dense practice in attending to the source: say a few sentences again."""
        sentences = [s for s in _SENTENCE_END.split(example.text) if s.strip()]
        begin = rng.randrange(len(sentences))
        words = " ".join(sentences[begin : begin + 2]).split()[:40]
        return self._pair(COPY_PREFIX + " ".join(words), " ".join(words))

    def _pair(self, source: str, target: str) -> Pair:
        encode = self._tokenizer.encode
        ids = encode(source, add_special_tokens=False).ids[: self._max_source - 1]
        out = encode(target, add_special_tokens=False).ids[: self._max_target - 1]
        return Pair([*ids, EOS], [*out, EOS])
