"""A promise in the documents names its test: it must be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"(tests/[\w/]+\.py)(?:::(test_\w+))?")
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))


def defined(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    missing = [
        f"{module}::{test}" if test else module
        for module, test in NAMED.findall(document.read_text())
        if not (ROOT / module).is_file() or (test and test not in defined(ROOT / module))
    ]
    assert missing == []


def test_reliability_names_its_tests() -> None:
    named = NAMED.findall((ROOT / "docs" / "reliability.md").read_text())
    assert len([test for _, test in named if test]) >= 8
