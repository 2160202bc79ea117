"""The quality gate: what an image's model and engine must show before the image is pushed."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
HELDOUT = FOLDER / "heldout.jsonl"
FLOORS = FOLDER / "floors.toml"
RUNNER = FOLDER / "runner.py"

# What the runner summarizes with: the engine as the service runs it, the same in float32, and
# `generate()` in float32, which the others are held against.
RUNS = ("served", "float32", "reference")
SEARCHES = {"greedy": 1, "beams": 4}  # the name of a search, and its `num_beams`


class GateError(Exception):
    """Wrong use or wrong input; the message says what, in one line."""
