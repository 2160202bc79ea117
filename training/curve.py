"""Plot the training curve: `python -m training.curve` writes docs/images/demo-model-curve.png."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from training import WORK

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "demo-model-curve.png"


def main() -> None:
    """Read the progress of the run and plot it."""
    curve = json.loads((WORK / "run" / "progress.json").read_text())["curve"]
    pairs = [point[1] / 1e6 for point in curve]
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(pairs, [point[2] for point in curve], color="0.6", label="training, all tasks")
    axes.plot(pairs, [point[3] for point in curve], color="tab:blue", label="held-out synopses")
    axes.set(xlabel="million pairs seen", ylabel="loss (nats per token)", ylim=(1, 6))
    axes.legend(frameon=False)
    figure.savefig(IMAGE, dpi=110)


if __name__ == "__main__":
    main()
