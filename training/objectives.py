"""What the model is asked to do with a text, as pairs of token ids.

Synopses are ten tokens long and say little about where to look, so most of the practice is dense:
saying sentences again, filling in missing spans (Raffel et al. 2020, section 3.1.4), picking the
sentence that stands for a passage (Zhang et al. 2020, PEGASUS, without the masking).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.corpus import LEAD, Corpus, Texts

EOS = 1
# Bytes that the normalizer removes from any text, so that their pieces are free to mark spans.
SENTINELS = range(3 + 1, 3 + 1 + 18)
SOURCES = (32, 64, 96, 128, 192, 256, 384)
_SUMMARY = 72  # tokens of a summary at most
TARGETS = (16, 32, _SUMMARY, 144)
Tokens = NDArray[np.uint16]
_END = np.array([EOS], np.uint16)


@dataclass(frozen=True, slots=True)
class Pair:
    """Encoder input and decoder target, both ending in the end token."""

    source: Tokens
    target: Tokens


@dataclass(frozen=True, slots=True)
class Stage:
    """What is practised from `begin` (share of the time) on.

    Attributes:
        max_source: encoder tokens at most; longer sources are cut.
        synopses, gists, copies: shares of the pairs; the rest is filling in.
        faithful: synopses count only if their text has this share of their content words.
    """

    begin: float
    max_source: int
    synopses: float
    gists: float
    copies: float
    faithful: float = 0.0


# Short and dense first, the task itself more and more, at the end only what the text bears out.
STAGES = (
    Stage(0.00, 96, synopses=0.15, gists=0.15, copies=0.35),
    Stage(0.10, 160, synopses=0.25, gists=0.25, copies=0.10),
    Stage(0.40, 256, synopses=0.60, gists=0.25, copies=0.03),
    Stage(0.65, 384, synopses=0.75, gists=0.20, copies=0.02),
    Stage(0.85, 384, synopses=0.80, gists=0.20, copies=0.00, faithful=0.6),
)


def stage_of(used: float) -> Stage:
    """The stage after `used` (0 to 1) of the time."""
    return [stage for stage in STAGES if stage.begin <= used][-1]


class Objectives:
    """Draws pairs from the corpus. One per process; deterministic by its seed."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self._corpus = corpus
        self._random = random.Random(seed)
        self._numpy = np.random.default_rng(seed)
        weight = corpus.weight.cumsum(dtype=np.float64)
        self._by_weight = weight / weight[-1]

    def draw(self, stage: Stage) -> Pair:
        """A pair of the stage's mixture."""
        share = self._random.random()
        if share < stage.synopses:
            return self._synopsis(stage)
        if share < stage.synopses + stage.gists:
            return self._gist(stage.max_source)
        texts = self._some_texts()
        if share < stage.synopses + stage.gists + stage.copies:
            return self._copy(texts)
        return self._fill(texts, min(stage.max_source, 192))

    def _some_texts(self) -> Texts:
        descriptions = self._random.random() < 0.3
        return self._corpus.descriptions if descriptions else self._corpus.passages

    def _synopsis(self, stage: Stage) -> Pair:
        corpus = self._corpus
        index = self._random.randrange(len(corpus.synopses))
        while corpus.faithful[index] < stage.faithful:
            index = self._random.randrange(len(corpus.synopses))
        parts = list(corpus.descriptions.sentences(index))
        # Later sentences are left out at times, so that no text is met in the same words for ever.
        if len(parts) > 2 and self._random.random() < 0.4:
            del parts[self._random.randrange(1, len(parts))]
        source = np.concatenate([corpus.descriptions.span(part, part + 1) for part in parts])
        return _summary(corpus, source, corpus.synopses.span(index, index + 1), stage.max_source)

    def _gist(self, max_source: int) -> Pair:
        corpus = self._corpus
        texts = corpus.passages
        index = int(np.searchsorted(self._by_weight, self._random.random()))
        every = texts.sentences(index)
        begin = every.start
        if self._random.random() < 0.4:
            begin = self._random.randrange(every.start, every.stop - 2)
        room = max_source - len(corpus.prefix) - 1
        count = self._random.randint(3, 14)
        end = begin + 1
        while end < min(every.stop, begin + count) and len(texts.span(begin, end + 1)) <= room:
            end += 1
        scores = corpus.gist[begin:end].copy()
        if begin > every.start:
            scores[0] += LEAD  # a lead is a lead in a window too
        wanted = 2 if end - begin >= 8 else 1
        best = sorted(np.argsort(-scores, kind="stable")[:wanted] + begin)
        target = np.concatenate([texts.span(part, part + 1) for part in best])
        return _summary(corpus, texts.span(begin, end), target, max_source)

    def _copy(self, texts: Texts) -> Pair:
        every = texts.sentences(self._random.randrange(len(texts)))
        begin = self._random.choice(every)
        words = texts.span(begin, min(begin + 2, every.stop))[:56]
        return Pair(
            np.concatenate([self._corpus.copy_prefix, words, _END]), np.concatenate([words, _END])
        )

    def _fill(self, texts: Texts, max_source: int) -> Pair:
        every = texts.sentences(self._random.randrange(len(texts)))
        begin = self._random.choice(every)
        words = texts.span(begin, every.stop)[:max_source]
        spans = min(len(SENTINELS), max(1, len(words) // 10))
        cuts = np.sort(
            self._numpy.choice(len(words), size=min(2 * spans, len(words)), replace=False)
        )
        source: list[Tokens] = []
        target: list[Tokens] = []
        at = 0
        for mark, (left, right) in zip(
            SENTINELS, zip(cuts[::2], cuts[1::2], strict=False), strict=False
        ):
            right = min(right, left + 1 + self._random.randrange(6))
            sentinel = np.array([mark], np.uint16)
            source += [words[at:left], sentinel]
            target += [sentinel, words[left:right]]
            at = right
        source += [words[at:], _END]
        target.append(_END)
        return Pair(np.concatenate(source), np.concatenate(target))


def _summary(corpus: Corpus, source: Tokens, target: Tokens, max_source: int) -> Pair:
    """The task itself: the prefix and a text, and what is to be said of it; both are cut."""
    room = max_source - len(corpus.prefix) - 1
    return Pair(
        np.concatenate([corpus.prefix, source[:room], _END]),
        np.concatenate([target[: _SUMMARY - 1], _END]),
    )


def held_out(corpus: Corpus, max_source: int = 384) -> list[Pair]:
    """The task itself on the texts held out for development."""
    descriptions, synopses = corpus.dev_descriptions, corpus.dev_synopses
    found: list[Pair] = []
    for index in range(len(synopses)):
        parts = descriptions.sentences(index)
        text = descriptions.span(parts.start, parts.stop)
        found.append(_summary(corpus, text, synopses.span(index, index + 1), max_source))
    return found


def batches(pairs: list[Pair], max_tokens: int) -> list[list[Pair]]:
    """Pairs of similar length together, at most `max_tokens` padded tokens a batch."""
    by_shape: dict[tuple[int, int], list[Pair]] = {}
    for pair in pairs:
        by_shape.setdefault(shape_of(pair), []).append(pair)
    groups: list[list[Pair]] = []
    for (source, target), alike in by_shape.items():
        rows = max(max_tokens // (source + target), 1)
        groups += [alike[i : i + rows] for i in range(0, len(alike), rows)]
    return groups


def shape_of(pair: Pair) -> tuple[int, int]:
    """Padded lengths. Few of them, for each new one costs a GPU a tenth of a second."""
    source = next(width for width in SOURCES if len(pair.source) <= width)
    target = next(width for width in TARGETS if len(pair.target) <= width)
    return source, target


def padded(rows: list[Tokens], width: int) -> NDArray[np.int64]:
    """(rows, width) with zeros behind each row."""
    out = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
