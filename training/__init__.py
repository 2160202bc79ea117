"""How the bundled demo model was made: data, vocabulary, training, export, evaluation."""

from pathlib import Path

WORK = Path(__file__).resolve().parent / "work"
EXPORTED = Path(__file__).resolve().parent.parent / "serve_app" / "demo_model"
PREFIX = "summarize: "
COPY_PREFIX = "repeat: "
