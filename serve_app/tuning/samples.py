"""The made-up usage log that ships with the project (`bench/sample_usage.py` writes it)."""

from __future__ import annotations

from pathlib import Path

SAMPLE = Path(__file__).parent / "samples" / "made-up-day.jsonl.gz"
TIMES = 40  # requests for which an event of it stands
