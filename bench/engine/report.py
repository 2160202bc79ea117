"""What was measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.engine.figures import GOALS

RESULTS = Path(__file__).parents[1] / "results"
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine(threads: int, *, gpu: bool = False) -> dict[str, Any]:
    """Processor, threads and versions; the GPU's name where one is measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    about = dict(
        tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line
    )
    versions = {}
    for name in ("torch", "transformers", "ctranslate2"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": about.get("model name", platform.machine()),
        "family": f"{about.get('cpu family', '?')}/{about.get('model', '?')}",
        "flags": [flag for flag in _FLAGS if flag in about.get("flags", "").split()],
        "threads": threads,
        "versions": versions,
        **({"gpu": _gpu_name()} if gpu else {}),
    }


def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"engine-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [_machine_line(result), ""]
    for name, rows in result["throughput"].items():
        best = max((r["tokens_per_s"] for r in rows if not r["ours"]), default=None)
        lines += [
            f"**{name}, tokens/s** ({result['counts'][name]})",
            "",
            "| engine | batch | tokens/s | over the best peer |",
            "|---|---|---|---|",
        ]
        for row in rows:
            ratio = f"{row['tokens_per_s'] / best:.2f}×" if best else ""
            lines.append(
                f"| {row['engine']} | {row['batch']} | {row['tokens_per_s']:.0f} | {ratio} |"
            )
        lines.append("")
    for name, rows in result["latency"].items():
        columns = [key for key in rows[0] if key not in ("engine", "ours")]
        lines += [
            f"**{name}, seconds**",
            "",
            "| engine | " + " | ".join(columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for row in rows:
            cells = [
                f"{row[key]:.3f}" if isinstance(row[key], float) else f"{row[key]}"
                for key in columns
            ]
            lines.append(f"| {row['engine']} | " + " | ".join(cells) + " |")
        lines.append("")
    for row in result["floor"]:
        parts = (
            f"weights {row['weights_mb']:.0f} MB"
            if "weights_mb" in row
            else f"products {row['products_ms']:.1f} ({row['gflops']:.0f} GFLOP/s)"
        )
        lines.append(
            f"- step of {row['documents']} documents, {row['dtype']}: {row['step_ms']:.3g} ms; "
            f"floor {row['floor_ms']:.3g} ms = {parts} + caches {row['cache_mb']:.0f} MB at "
            f"{row['bandwidth_gb_s']:.0f} GB/s"
        )
    for row in result["memory"]:
        lines.append(
            f"- memory, {row['dtype']}: peak {row['peak_mb']:.0f} MB, of it {row['before_mb']:.0f} "
            f"before the model; weights {row['weights_mb']:.0f}, planned caches "
            f"{row['caches_mb']:.0f}"
        )
    lines += ["", "| goal | bound | measured | |", "|---|---|---|---|"]
    for key, label, ratio in result["ratios"]:
        goal = GOALS[key]
        lines.append(
            f"| {label} | {goal} | {ratio:.2f}× | {'met' if goal.met(ratio) else 'missed'} |"
        )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Throughput of all engines, and latencies under load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [*result["throughput"].items(), *result["poisson"].items()]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.6))
    for axis, (name, rows) in zip(axes if len(panels) > 1 else [axes], panels, strict=True):
        labels = [row["engine"] for row in rows]
        colours = [_colour(row) for row in rows]
        if name in result["throughput"]:
            axis.bar(labels, [row["tokens_per_s"] for row in rows], color=colours)
            axis.set_title(f"{name}: tokens/s", fontsize=9)
        else:
            for row, colour in zip(rows, colours, strict=True):
                shares = ["p50", "p95", "p99"]
                axis.plot(shares, [row[s] for s in shares], "o-", color=colour, label=row["engine"])
            axis.set_yscale("log")
            axis.set_title(f"{name}: latency, s", fontsize=9)
            axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(0, 0.86))
        axis.tick_params(axis="x", labelrotation=60, labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _colour(row: dict[str, Any]) -> str:
    greens = {"int8": "#0b5d3f", "bfloat16": "#2f9e74", "float32": "#8fd3b6"}
    greys = {"int8": "#5b6670", "bfloat16": "#8a949d", "float32": "#b9c1c8"}
    return (greens if row["ours"] else greys)[row["engine"].split()[-1]]


def _machine_line(result: dict[str, Any]) -> str:
    about = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    on = f", {about['gpu']}" if "gpu" in about else ""
    return (
        f"{result['model']}: {about['cpu']} (family/model {about['family']}; "
        f"{' '.join(about['flags'])}), {about['threads']} threads{on}; {versions}"
    )
