"""Gather prose to practise on: `python -m training.passages` writes `training/work/passages.jsonl`.

Manuals, books and dictionaries that Debian ships as packages, and the news and encyclopaedia
articles that gensim tests itself with; fetched and only unpacked, not installed. Each line is a
passage of a few sentences and the package it is from. Nothing of it is part of this repository;
every text stays under its package's licence.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from training import WORK, apt

# Books and essays, dictionaries (every word of the language once), manuals of programs that people
# without interest in computers use, then technical manuals.
PACKAGES = (
    "anarchism sisu-markup-samples debian-handbook dict-gcide dict-foldoc dict-jargon dasher-data "
    "gnome-user-docs gimp-help-en libreoffice-help-en-us kmymoney-common gramps scribus-doc "
    "lilypond-doc-html tuxpaint-data debian-faq debian-policy developers-reference linux-doc-6.1 "
    "postgresql-doc-15 git-doc manpages perl-doc octave-doc maxima-doc sqlite3-doc "
    "apache2-doc glibc-doc-reference gawk-doc grass-doc exim4-doc-html cmake-doc "
    "imagemagick-6-doc ghostscript-doc python-pandas-doc python-networkx-doc "
    "mercurial-common bash-doc zsh-doc"
).split()
GENSIM = "gensim==4.4.0"
_TEXT = re.compile(r"\.(html?|txt|xhtml|page|docbook|xml|sst|ssm|cfg|typ|[1-8]|dz|rst|md|utf8)$")
_BLOCK = re.compile(r"<(p|dd|li|para)\b[^>]*>(.*?)</\1>", re.S | re.I)
_TAG = re.compile(r"<[^>]{0,500}>")
_ROFF = re.compile(r"^[.'].*$|\\f[A-Z]|\\&|\\-", re.M)
_BRACKETS = re.compile(r"\[[^\[\]]{0,80}\]|[{}]")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_LEADER = re.compile(r"^(?:\d+[.:]\s*|[-*•]\s+|\([a-z0-9]\)\s*)")
_COMMON = frozenset("the of and to a in is that for it as was with be by on are this or an".split())
_MAX_BYTES = 6_000_000  # of one file
_WORDS = (24, 220)  # of a passage


def is_sentence(text: str) -> bool:
    """Whether `text` reads like a sentence, not like code, a heading or a table."""
    if not 20 <= len(text) <= 400 or not (text[0].isupper() or text[0] in "\"'"):
        return False
    if text[-1] not in ".!?\"')" or re.search(r"[<>|_=\\#$~^]|\.{3}|--|  |::|https?:", text):
        return False
    words = text.split()
    letters = sum(c.isalpha() or c == " " for c in text)
    lower = sum(word[0].islower() for word in words)
    return len(words) >= 5 and letters >= 0.9 * len(text) and lower >= 0.5 * len(words)


def is_english(text: str) -> bool:
    """Whether `text` has English's commonest words as often as English has, and its letters."""
    words = text.lower().split()
    common = sum(word in _COMMON for word in words)
    return common >= 0.18 * len(words) and sum(map(str.isascii, text)) >= 0.97 * len(text)


def blocks(name: str, content: str) -> Iterator[str]:
    """Paragraphs of a file, markup removed."""
    if re.search(r"\.(html?|xhtml|page|docbook|xml)$", name) or content[:200].lstrip()[:1] == "<":
        found = (_TAG.sub("", match[1]) for match in _BLOCK.findall(content))
        yield from (html.unescape(block) for block in found)
        return
    if re.search(r"\.[1-8]$", name):
        content = _ROFF.sub("", content)
    if name.endswith(".dz"):
        content = _BRACKETS.sub("", content)
    yield from re.split(r"\n\s*\n|\n(?=\s*\d+[.:] )", content)


def passages(paragraphs: Iterator[str]) -> Iterator[str]:
    """Runs of neighbouring sentences, bounded in words."""
    kept: list[str] = []
    count = 0
    for paragraph in paragraphs:
        text = _LEADER.sub("", " ".join(paragraph.split()))
        sentences = [s for s in _SENTENCE.split(text) if s]
        good = [s for s in sentences if is_sentence(s)]
        whole = bool(good) and len(good) == len(sentences)
        for sentence in good if whole or len(good) > 2 else []:
            kept.append(sentence)
            count += len(sentence.split())
            if count >= _WORDS[1]:
                yield " ".join(kept)
                kept, count = [], 0
        if count >= _WORDS[0] and (not whole or count >= _WORDS[1] // 2):
            yield " ".join(kept)
            kept, count = [], 0
    if count >= _WORDS[0]:
        yield " ".join(kept)


def files(package: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of a .deb's documents, unpacked in memory."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                name = re.sub(r"\.gz$", "", member.name)
                if not member.isfile() or member.size > 30 * _MAX_BYTES or not _TEXT.search(name):
                    continue
                if re.search(r"/(de|fr|es|it|ru|ja|pt|pl|nl|zh_..|ko|cs|pt_br)/", name, re.I):
                    continue
                stream = archive.extractfile(member)
                raw = stream.read() if stream else b""
                if raw[:2] == b"\x1f\x8b":
                    raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read()
                if len(raw) <= _MAX_BYTES or name.endswith(".dz"):
                    yield name, raw.decode("utf-8", errors="replace")


def wheel(path: Path) -> Iterator[tuple[str, str]]:
    """The English corpora among gensim's test data: Lee's news briefs, encyclopaedia articles."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if "/lee" in name and name.endswith(".cor"):
                for article in archive.read(name).decode("latin-1").splitlines():
                    yield name, article
            elif "enwiki-latest" in name and name.endswith(".bz2"):
                for page in bz2.decompress(archive.read(name)).decode().split("<page>"):
                    yield name, plain(page)


def plain(page: str) -> str:
    """An encyclopaedia page's prose, MediaWiki's markup removed."""
    text = html.unescape(page.partition("<text")[2].partition(">")[2])
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->", "", text, flags=re.S)
    for _ in range(4):  # templates and tables nest
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[\S+ ([^\]]*)\]|'{2,}|\(\s*[;,]?\s*\)", r"\1", text)
    return re.sub(r"^[=*#:;|!{].*$", "", text, flags=re.M).replace("\n", "\n\n")


def documents() -> Iterator[tuple[str, Iterator[tuple[str, str]]]]:
    """Each package and its files."""
    folder = WORK / "packages"
    apt.download(PACKAGES, folder)
    for path in sorted(folder.glob("*.deb")):
        yield path.name.partition("_")[0], files(path)
    if not any(folder.glob("gensim-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--only-binary=:all:", "--dest", str(folder), GENSIM], check=True)
    for path in folder.glob("gensim-*.whl"):
        yield "gensim", wheel(path)


@dataclass(frozen=True, slots=True)
class Passage:
    """A few sentences of prose and the package they are from."""

    package: str
    text: str


def load_passages() -> list[Passage]:
    """All passages, in the order of their packages."""
    with (WORK / "passages.jsonl").open(encoding="utf-8") as file:
        return [Passage(**json.loads(line)) for line in file]


def main() -> None:
    """Fetch, unpack, split into passages, write each distinct one once."""
    seen: set[bytes] = set()
    with (WORK / "passages.jsonl").open("w", encoding="utf-8") as out:
        for package, found in documents():
            count = words = 0
            for name, content in found:
                for passage in passages(blocks(name, content)):
                    key = hashlib.blake2b(passage[:200].encode(), digest_size=8).digest()
                    if key in seen or not is_english(passage):
                        continue
                    seen.add(key)
                    count += 1
                    words += len(passage.split())
                    row = asdict(Passage(package, passage))
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(f"{package}: {count} passages, {words} words", flush=True)


if __name__ == "__main__":
    main()
