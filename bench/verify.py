"""Simulated against live on this machine: `python -m bench.verify [--duration 180] [--json FILE]`.

One replica is measured, then three loads are sent to a service started for each, and simulated:
Poisson, bursty and a flash crowd, of the demo model with one thread and at most two replicas.
Prints the table of docs/tuning.md. About 13 minutes; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Long answers, so that engines and not HTTP take the processors; few enough at once that two
# replicas and the rest of the service mostly fit on two cores.
_LOADS = {
    "Poisson": ("--arrivals", "poisson", "--rate", "2"),
    "bursty": ("--arrivals", "bursty", "--rate", "1.2", "--burstiness", "6"),
    "flash crowd": ("--arrivals", "flash-crowd", "--rate", "0.6", "--peak", "4"),
}
_SIZES = ("--input-tokens", "lognormal:150:0.4", "--output-tokens", "uniform:300:500")
_SETTINGS = {
    "max_replicas": 2,
    "target_ongoing_requests": 1,
    "look_back_period_s": 15,
    "upscale_delay_s": 15,
    "downscale_delay_s": 40,
}
_COMMAND = (sys.executable, "-m", "serve_app.cli.main", "tune")


def verified(name: str, load: tuple[str, ...], duration: float, model: Path) -> dict[str, Any]:
    """One load, both ways."""
    changes = [f"--set={key}={value}" for key, value in _SETTINGS.items()]
    done = subprocess.run(
        [*_COMMAND, "verify", *load, *_SIZES, *changes, "--duration", f"{duration:g}",
         "--model", str(model), "--name", name, "--json"],
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if not done.stdout:
        sys.exit(f"{name}: nothing was compared")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def row(told: dict[str, Any]) -> str:
    """A line of the table."""
    live, simulated = told["live"], told["simulated"]
    pairs = " | ".join(
        f"{live[f'{one}_s']:.3f} / {simulated[f'{one}_s']:.3f} ({told[f'{one}_error']:+.0%})"
        for one in ("p50", "p95", "p99")
    )
    met = f"{live['attainment']:.1%} / {simulated['attainment']:.1%}"
    return (
        f"| {told['name']} | {live['requests']} | {pairs} | {met} | "
        f"{live['replicas_mean']:.2f} / {simulated['replicas_mean']:.2f} | "
        f"{told['timeline_distance']:.2f} |"
    )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--duration", type=float, default=180, help="of each load, seconds")
    parser.add_argument("--profile-seconds", type=float, default=40)
    parser.add_argument("--json", type=Path, help="write all comparisons to this file, too")
    arguments = parser.parse_args()
    # What Ray says at its start is not this table's.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "replica.yaml"
        measured = subprocess.run(
            [*_COMMAND, "profile", "--threads", "1", "--seconds", f"{arguments.profile_seconds:g}"],
            stdout=subprocess.PIPE,
            check=False,  # 1: the model is off, as a busy machine's is; the table will show it
        )
        model.write_bytes(measured.stdout)
        print(
            "| load | requests | p50, s, live / simulated | p95 | p99 | within 2 s | replicas, "
            "mean | timeline distance |\n|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        for name, load in _LOADS.items():
            comparisons.append(verified(name, load, arguments.duration, model))
            print(row(comparisons[-1]), flush=True)
    for one in comparisons:
        print("\n".join(one["notes"][2:]), file=sys.stderr)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(comparisons, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
