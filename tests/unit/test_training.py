"""What the demo model's data and figures are made of."""

from __future__ import annotations

import pytest

from training.data import Example, examples, long_description, part_of, split, stanzas
from training.evaluate import faithfulness

_TRANSLATION = """\
Package: lampreader
Description-md5: 0
Description-en: viewer for log files
 Lampreader follows files as they grow and marks the
 lines that match a pattern.
 .
 It can:
  * fold repeated lines
  * run in a terminal
 .
 No setup is needed at all.

Package: lampreader-dbg
Description-en: debug symbols for lampreader
 Lampreader follows files as they grow. These are the debug symbols of it, and long enough.
"""


def test_a_translation_becomes_examples() -> None:
    [example] = examples([_TRANSLATION], {"lampreader": "lamp"})
    assert example == Example(
        id="lampreader",
        source="lamp",
        text=(
            "Lampreader follows files as they grow and marks the lines that match a pattern.\n"
            "It can:\n* fold repeated lines\n* run in a terminal\nNo setup is needed at all."
        ),
        synopsis="viewer for log files",
    )


def test_control_files_are_read_by_paragraph() -> None:
    assert list(stanzas("A: 1\nB: 2\n more\n\nA: 3\n")) == [
        {"A": "1", "B": "2\nmore"},
        {"A": "3"},
    ]


def test_indented_lines_stand_alone() -> None:
    assert long_description([" - one", "   goes on", " - two"]) == "- one\ngoes on\n- two"


def test_no_source_package_stands_on_both_sides() -> None:
    words = [f"w{i}" for i in range(400)]
    made = [
        Example(f"p{i}", f"s{i // 3}", " ".join(words[i : i + 30]), "a synopsis")
        for i in range(300)
    ]
    parts = split(made)
    sources = {part: {example.source for example in rows} for part, rows in parts.items()}
    assert sources["test"]
    assert sources["dev"]
    assert not sources["train"] & (sources["test"] | sources["dev"])
    assert part_of("s1") == part_of("s1")


def test_near_repeats_of_held_out_texts_are_not_trained_on() -> None:
    held = next(f"s{i}" for i in range(1_000) if part_of(f"s{i}") == "test")
    seen = next(f"s{i}" for i in range(1_000) if part_of(f"s{i}") == "train")
    text = " ".join(f"word{i}" for i in range(40))
    parts = split(
        [
            Example("held", held, text, "x y"),
            Example("near", seen, text + " and a few more words", "x y"),
            Example("far", seen, " ".join(f"other{i}" for i in range(40)), "x y"),
        ]
    )
    assert [example.id for example in parts["train"]] == ["far"]


@pytest.mark.parametrize(
    ("summary", "share"),
    [("viewer of logs", 1.0), ("viewers for log files", 1.0), ("editor for log files", 2 / 3)],
)
def test_faithfulness_counts_content_words_by_stem(summary: str, share: float) -> None:
    assert faithfulness(summary, "A viewer that shows log files.") == pytest.approx(share)
