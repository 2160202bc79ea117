"""Make the training data: Debian's package descriptions, each with its human synopsis.

`python -m training.data` asks apt for the package lists of four Debian releases, and writes
`train.jsonl`, `dev.jsonl` and `test.jsonl` under `training/work/`. The split goes by source
package, so that sister packages never stand on both sides; training texts that nearly repeat a
held-out one are dropped; what is held out is of one release, so that no text stands there in four
versions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from training import WORK, apt

_MAX_WORDS = 400
_MIN_WORDS = 12
_SHINGLE = 5  # words
_NEAR = 0.4  # share of a held-out text's shingles found in a training text
_HELD_OUT_PERCENT = {"test": 2, "dev": 2}
_DUMMY = re.compile(r"\b(transitional|dummy|metapackage|meta-package|debug symbols)\b", re.I)


@dataclass(frozen=True, slots=True)
class Example:
    """A package's long description and synopsis. `source` is its source package."""

    id: str
    source: str
    text: str
    synopsis: str


def stanzas(content: str) -> Iterator[dict[str, str]]:
    """Paragraphs of a Debian control file (deb822), continuation lines joined by newlines."""
    for paragraph in re.split(r"\n\s*\n", content):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith((" ", "\t")):
                if name:
                    fields[name] += "\n" + line[1:]
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def long_description(lines: Iterable[str]) -> str:
    """Text of a long description: wrapped lines joined, paragraphs and list items kept apart."""
    blocks: list[str] = []
    joined = False
    for line in lines:
        if line.strip() in ("", "."):
            joined = False
        elif joined and not line.startswith(" ") and not _is_item(line):
            blocks[-1] += " " + line.strip()
        else:
            blocks.append(line.strip())
            # Indented lines are verbatim or list items; the next one may go on with the item.
            joined = not line.startswith(" ") or _is_item(line)
    return "\n".join(" ".join(block.split()) for block in blocks)


def _is_item(line: str) -> bool:
    return re.match(r"\s*[-*+o•]\s", line) is not None


def examples(translations: Iterable[str], sources: dict[str, str]) -> list[Example]:
    """Examples worth learning from, one per distinct text."""
    seen: set[str] = set()
    found: list[Example] = []
    for content in translations:
        for fields in stanzas(content):
            synopsis, _, rest = fields.get("Description-en", "").partition("\n")
            text = long_description(rest.split("\n"))
            words = text.split()
            synopsis = " ".join(synopsis.split())
            if len(words) < _MIN_WORDS or len(synopsis.split()) < 2:
                continue
            if _DUMMY.search(synopsis) or text in seen:
                continue
            seen.add(text)
            package = fields["Package"]
            if len(words) > _MAX_WORDS:
                text = " ".join(words[:_MAX_WORDS])
            found.append(Example(package, sources.get(package, package), text, synopsis))
    return found


def part_of(source: str) -> str:
    """`train`, `dev` or `test`, from a hash of the source package's name."""
    bucket = int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") % 100
    for part, percent in _HELD_OUT_PERCENT.items():
        if bucket < percent:
            return part
        bucket -= percent
    return "train"


def shingles(text: str) -> set[int]:
    """Hashes of all runs of five words."""
    words = re.findall(r"\w+", text.lower())
    runs = (" ".join(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1))
    return {int.from_bytes(hashlib.blake2b(r.encode(), digest_size=8).digest()) for r in runs}


def split(all_examples: Iterable[Example]) -> dict[str, list[Example]]:
    """The three parts, near-duplicates of held-out texts taken out of the training part."""
    parts: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
    for example in all_examples:
        parts[part_of(example.source)].append(example)
    held_out = parts["dev"] + parts["test"]
    owners: dict[int, list[int]] = defaultdict(list)
    sizes: list[int] = []
    for index, example in enumerate(held_out):
        runs = shingles(example.text)
        sizes.append(max(len(runs), 1))
        for run in runs:
            owners[run].append(index)

    def near(example: Example) -> bool:
        shared = Counter(index for run in shingles(example.text) for index in owners.get(run, ()))
        return any(count / sizes[index] >= _NEAR for index, count in shared.items())

    parts["train"] = [example for example in parts["train"] if not near(example)]
    return parts


def main() -> None:
    """Fetch, parse, split, write."""
    apt.update()
    sources: dict[str, str] = {}
    translations: list[str] = []
    counts: list[int] = []
    for release in apt.RELEASES:
        for path in sorted(apt.LISTS.glob(f"*_{release}_*_Packages*")):
            for fields in stanzas(apt.read(path)):
                package = fields.get("Package", "")
                sources.setdefault(package, fields.get("Source", package).split()[0])
        lists = sorted(apt.LISTS.glob(f"*_{release}_*Translation-en*"))
        translations += [apt.read(path) for path in lists]
        counts.append(len(translations))
    first = {example.id for example in examples(translations[: counts[0]], sources)}
    parts = split(examples(translations, sources))
    for part in _HELD_OUT_PERCENT:
        parts[part] = [example for example in parts[part] if example.id in first]
    for part, rows in parts.items():
        rows.sort(key=lambda example: hashlib.sha256(example.id.encode()).digest())
        with (WORK / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for example in rows:
                file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")
        print(f"{part}: {len(rows)} examples")


def load(part: str) -> list[Example]:
    """Examples of `train`, `dev` or `test`, in a fixed random order."""
    with (WORK / f"{part}.jsonl").open(encoding="utf-8") as file:
        return [Example(**json.loads(line)) for line in file]


if __name__ == "__main__":
    main()
