"""docs/security.md: each threat has its test, and each test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/security.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and "| test |" not in line]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_a_threat_has_tests(row: str) -> None:
    threat, stands, tests = (cell.strip() for cell in row.strip("|").split("|"))
    assert threat
    assert stands
    assert NAMED.findall(tests)
    assert NAMED.sub("", tests).strip(" ,") == ""


def test_every_named_test_is_there() -> None:
    named = NAMED.findall(TEXT)
    assert len(named) > 50
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), name
