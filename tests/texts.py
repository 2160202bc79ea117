"""Texts for tests: documentation that comes with Python, of which no model has seen a word.

The demo model is not trained on any of it, so these are held out by construction.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache

_MODULES = (
    "argparse", "asyncio", "collections", "concurrent.futures", "configparser", "contextlib", "csv",
    "datetime", "decimal", "difflib", "email.message", "fractions", "functools", "heapq",
    "http.client", "http.cookiejar", "ipaddress", "itertools", "json", "logging", "mailbox",
    "multiprocessing.pool", "optparse", "pathlib", "pickle", "pprint", "queue", "random",
    "selectors", "shutil", "smtplib", "socket", "sqlite3", "statistics", "string", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "timeit", "turtle", "typing", "unittest.mock",
    "urllib.request", "uuid", "wave", "weakref", "xml.dom.minidom", "zipfile",
)  # fmt: skip


@cache
def docstrings() -> tuple[str, ...]:
    """Distinct docstrings of 25 to 180 words, in a fixed order."""
    found: dict[str, None] = {}
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # turtle, where Tk is not installed
            continue
        members = [module, *(value for _, value in sorted(vars(module).items(), key=str))]
        for member in members:
            text = inspect.getdoc(member) if callable(member) or member is module else None
            if text and 25 <= len(text.split()) <= 180:
                found.setdefault(" ".join(text.split()))
    return tuple(found)


def texts(count: int) -> list[str]:
    """The first `count` texts."""
    chosen = docstrings()[:count]
    assert len(chosen) == count
    return list(chosen)


def long_text(words: int) -> str:
    """A document of at least `words` words, in paragraphs."""
    parts: list[str] = []
    total = 0
    index = 0
    pool = docstrings()
    while total < words:
        text = pool[index % len(pool)]
        parts.append(f"Section {index}. {text}")
        total += len(parts[-1].split())
        index += 1
    return "\n\n".join(parts)
