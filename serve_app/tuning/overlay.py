"""A recommendation as values of the chart, and the commands that put them in force."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from serve_app.tuning.model import ModelFileError, Scaling

# Of the chart, where a values file does not say otherwise.
_MOST_PODS, _SURGE_PERCENT, _PER_POD = 32, 25, 1


def overlay(scaling: Scaling, current: Scaling, values: dict[str, Any]) -> dict[str, Any]:
    """Values that change the autoscaling to `scaling`, and what the chart wants changed with it.

    Args:
        current: the settings in force.
        values: the values in force, as far as they are known.
    """
    unsaid = {"initial_replicas", "downscale_to_zero_delay_s"}
    if scaling.signal == "requests":
        unsaid.add("target_drain_s")
    config = scaling.model_dump(exclude=unsaid)
    first = current.initial_replicas
    if first is not None and not scaling.min_replicas <= first <= scaling.max_replicas:
        config["initial_replicas"] = None  # null: as many as at least
    summarizer: dict[str, Any] = {"autoscaling_config": config}
    said = values.get("summarizer") or {}
    workers = said.get("workers") or {}
    surge = said.get("max_surge_percent", _SURGE_PERCENT)
    replicas = scaling.max_replicas + math.ceil(scaling.max_replicas * surge / 100 - 1e-9)
    pods = math.ceil(replicas / said.get("replicasPerWorker", _PER_POD))
    if pods > workers.get("maxReplicas", _MOST_PODS):
        summarizer["workers"] = {"maxReplicas": pods}
    return {"summarizer": summarizer}


def overlay_text(values: dict[str, Any], notes: list[str]) -> str:
    """As YAML, with notes above it."""
    said = "".join(f"# {note}\n" for note in notes)
    return said + yaml.safe_dump(_plain(values), sort_keys=False)


def read_values(path: Path | None) -> dict[str, Any]:
    """The values of a file that `model.load_values` takes; nothing of none.

    Raises:
        ModelFileError: it cannot be read any more.
    """
    if path is None:
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ModelFileError(f"{path}: {' '.join(str(error).split())[:120]}") from None


def commands(file: str) -> list[str]:
    """Shell lines that put the overlay in force: with Helm, and by a commit for Argo CD."""
    values = "kuberay/argocd/values/production.yaml"
    return [
        "# Helm:",
        f"helm upgrade t5-summarizer helm/t5-summarizer --namespace t5 --reuse-values -f {file}",
        "# Argo CD: a commit that the next release takes (docs/delivery.md)",
        f"yq -i '. *= load(\"{file}\")' {values}",
        f"git commit -m 'Autoscaling as t5-serve tune recommends' {values}",
        "git push",
    ]


def _plain(value: Any) -> Any:
    """Whole numbers without a point, as people write them."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
