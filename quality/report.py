"""What the gate tells: a table for the terminal, JSON for programs, Markdown for GitHub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quality import RUNS, SEARCHES
from quality.inputs import Bounds, ModelBounds, Rows, Text
from quality.runs import Image
from quality.scores import Criterion, figures, measured_bounds

_NAMES = {
    "failed": "summaries that failed",
    "float32_identical": "float32 engine, same tokens as generate()",
    "served_identical": "served engine, same tokens as generate()",
    "served_rougeL_loss": "served engine, ROUGE-L lost against generate()",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "empty": "empty",
    "looping": "looping",
    "cut_off": "cut off",
}
_SHARES = ("float32_identical", "served_identical", "empty", "looping", "cut_off")


def shown(key: str, value: float) -> str:
    """A figure as people read it: shares in percent, points of ROUGE as they are."""
    if key == "failed":
        return f"{value:.0f}"
    return f"{100 * value:.1f} %" if key in _SHARES else f"{value:.2f}"


def failure(criterion: Criterion) -> str:
    """What a criterion that was not met says, in one line."""
    key = criterion.name.partition(".")[2]
    bound = f"{criterion.kind} {shown(key, criterion.bound)}"
    return f"{criterion.name}: {shown(key, criterion.value)}, {bound} ({_NAMES[key]})"


def table(criteria: Sequence[Criterion]) -> list[tuple[str, str, str, str, str]]:
    """Search, figure, value, bound, verdict."""
    rows = []
    for one in criteria:
        search, _, key = one.name.partition(".")
        bound = f"{'≥' if one.kind == 'floor' else '≤'} {shown(key, one.bound)}"
        verdict = "ok" if one.passed else "FAILED"
        rows.append((search, _NAMES[key], shown(key, one.value), bound, verdict))
    return rows


def plain(criteria: Sequence[Criterion]) -> str:
    """The table for a terminal."""
    rows = table(criteria)
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}"
        f"  {row[3]:<{widths[3]}}  {row[4]}"
        for row in rows
    )


def markdown(report: dict[str, Any], criteria: Sequence[Criterion]) -> str:
    """The report for GitHub's page of the run."""
    model, image = report["model"], report["image"]
    of = f"`{model['name']}` (weights `{model['weights'][:12]}`)"
    where = f" in `{image['name']}` (`{image['id'][:12]}`)" if image else ""
    lines = [f"## Quality gate: {report['verdict']}", "", f"Model {of}{where}.", ""]
    lines += ["| search | figure | value | bound | |", "|---|---|---|---|---|"]
    for search, name, value, bound, verdict in table(criteria):
        mark = "✅" if verdict == "ok" else "❌"
        lines.append(f"| {search} | {name} | {value} | {bound} | {mark} |")
    lines += ["", "General prose, which does not count:", ""]
    lines += [f"- {line}" for line in prose_lines(report)]
    return "\n".join(lines) + "\n"


def prose_lines(report: dict[str, Any]) -> list[str]:
    """One line for each search about the texts that do not count."""
    return [
        f"{search}: " + ", ".join(f"{_NAMES[key]} {shown(key, value)}" for key, value in at.items())
        for search, at in report["prose"].items()
    ]


def build(
    rows: Rows,
    texts: Sequence[Text],
    heldout: Path,
    image: Image | None,
    floors_of: str,
    bounds: ModelBounds,
    criteria: Sequence[Criterion],
) -> dict[str, Any]:
    """Everything, for `gate.json`."""
    software = [text for text in texts if text.group == "software"]
    prose = [text for text in texts if text.group == "prose"]

    def means(run: str, of: Sequence[Text]) -> dict[str, dict[str, float]]:
        return {search: figures(rows, run, search, of).means() for search in SEARCHES} if of else {}

    about = {key: value for key, value in rows.model.items() if key not in ("model", "versions")}
    return {
        "verdict": "passed" if all(one.passed for one in criteria) else "failed",
        "image": asdict(image) if image else None,
        "model": {"name": rows.model["model"], "floors_of": floors_of, **about},
        "dtypes": rows.dtypes,
        "versions": rows.model.get("versions", {}),
        "heldout": {
            "sha256": hashlib.sha256(heldout.read_bytes()).hexdigest(),
            "software": len(software),
            "prose": len(prose),
        },
        "criteria": [{**asdict(one), "passed": one.passed} for one in criteria],
        "figures": {run: means(run, software) for run in RUNS},
        "prose": means("served", prose),
        "floors_measured_with": bounds.weights,
    }


def measured(rows: Rows, texts: Sequence[Text], name: str) -> str:
    """The model's section of `floors.toml`, from these summaries."""
    software = [text for text in texts if text.group == "software"]
    lines = [f'[models."{name}"]', f'weights = "{rows.model["weights"][:12]}"']
    for search in SEARCHES:
        found = figures(rows, "served", search, software)
        bounds: Bounds = measured_bounds(found)
        lines += ["", f'[models."{name}".{search}]']
        means = found.means()
        for key, value in bounds.model_dump().items():
            lines.append(f"{key} = {value}  # measured: {shown(key, means[key])}")
    return "\n".join(lines)
