"""Tokenize and score all training texts: `python -m training.prepare` writes `corpus.npz`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer

from training import COPY_PREFIX, PREFIX, WORK
from training.corpus import CORPUS, LEAD, TEXTS, Corpus, Texts, save
from training.data import load
from training.evaluate import content_words, faithfulness
from training.passages import load_passages

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
# Passages to choose a sentence from; a dictionary's have none that stands for the others.
_NO_GIST = re.compile(r"dict-|libreoffice|lilypond|git-doc|zsh-doc|perl-doc|pandas")
_WEIGHT = {"gensim": 8.0, "anarchism": 1.5, "sisu-markup-samples": 1.0, "linux-doc-6.1": 0.3}
# Begins of sentences that lean on the one before.
_LEANING = re.compile(
    r"(it|its|this|that|these|those|he|she|his|her|they|their|there|such|here|but|and|or|so|then|"
    r"however|thus|therefore|also|as|if|when|for|in|see|note|you|we|i)\b",
    re.I,
)


def sentences(text: str) -> list[str]:
    """Sentences and lines, without those that are empty."""
    return [s for s in _SENTENCE_END.split(text) if s.strip()]


def gists(parts: Sequence[str]) -> list[float]:
    """How well each sentence stands for all: unigram F1 with the others (Zhang et al. 2020,
    PEGASUS, section 3.1.1, "Ind-Orig"), the first one ahead, long ones and those that lean on
    another behind.
    """
    bags = [set(content_words(part)) for part in parts]
    found: list[float] = []
    for i, bag in enumerate(bags):
        rest = set().union(*(other for j, other in enumerate(bags) if j != i))
        score = 2 * len(bag & rest) / (len(bag) + len(rest)) if bag and rest else 0.0
        words = len(parts[i].split())
        score += LEAD * (i == 0) - 0.008 * max(words - 14, 0)
        if _LEANING.match(parts[i]) or not 6 <= words <= 32 or parts[i][-1:] != ".":
            score -= 0.5
        found.append(score)
    return found


def _texts(documents: Iterable[Sequence[str]], tokenizer: Tokenizer) -> Texts:
    documents = list(documents)
    flat = [part for parts in documents for part in parts]
    ids = [e.ids for e in tokenizer.encode_batch_fast(flat, add_special_tokens=False)]
    ends = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    first = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return Texts(np.fromiter((t for row in ids for t in row), np.uint16), ends, first)


def build() -> Corpus:
    """Tokenize and score everything."""
    tokenizer = Tokenizer.from_file(str(WORK / "tokenizer" / "tokenizer.json"))
    train, dev = load("train"), load("dev")
    prose = load_passages()
    parts = [sentences(passage.text) for passage in prose]
    wanted = [
        len(p) > 2 and not _NO_GIST.search(row.package) for p, row in zip(parts, prose, strict=True)
    ]
    gist = [
        score
        for part, wants in zip(parts, wanted, strict=True)
        for score in (gists(part) if wants else [0.0] * len(part))
    ]
    prefix, copy_prefix = (
        np.array(tokenizer.encode(p.strip(), add_special_tokens=False).ids, np.uint16)
        for p in (PREFIX, COPY_PREFIX)
    )
    return Corpus(
        descriptions=_texts((sentences(e.text) for e in train), tokenizer),
        synopses=_texts(([e.synopsis] for e in train), tokenizer),
        faithful=np.array([faithfulness(e.synopsis, e.text) or 0.0 for e in train], np.float32),
        passages=_texts(parts, tokenizer),
        gist=np.array(gist, np.float32),
        weight=np.array(
            [w * _WEIGHT.get(row.package, 0.6) for w, row in zip(wanted, prose, strict=True)],
            np.float32,
        ),
        dev_descriptions=_texts((sentences(e.text) for e in dev), tokenizer),
        dev_synopses=_texts(([e.synopsis] for e in dev), tokenizer),
        prefix=prefix,
        copy_prefix=copy_prefix,
        vocabulary=tokenizer.get_vocab_size(),
    )


def main() -> None:
    """Build, write, and say what there is."""
    corpus = build()
    save(corpus)
    for name in TEXTS:
        texts: Texts = getattr(corpus, name)
        print(f"{name}: {len(texts)} texts, {len(texts.tokens)} tokens")
    print(f"{CORPUS.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
