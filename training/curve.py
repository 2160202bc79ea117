"""Plot the training curve: `python -m training.curve` writes docs/images/demo-model-curve.png."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from training import WORK

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "demo-model-curve.png"
_SMOOTHED = 12  # points


def main() -> None:
    """Read the progress of the run and plot it."""
    curve = json.loads((WORK / "run" / "progress.json").read_text())["curve"]
    pairs = [point[1] / 1e3 for point in curve]
    losses = [point[2] for point in curve]
    windows = [losses[max(0, i - _SMOOTHED + 1) : i + 1] for i in range(len(losses))]
    smooth = [sum(window) / len(window) for window in windows]
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(pairs, losses, color="0.8", linewidth=0.8, label="each 15 s")
    axes.plot(pairs, smooth, color="tab:blue", label=f"mean of {_SMOOTHED}")
    axes.set(xlabel="thousand pairs seen", ylabel="training loss (nats per token)", ylim=(2, 8))
    axes.legend(frameon=False)
    figure.savefig(IMAGE, dpi=110)


if __name__ == "__main__":
    main()
