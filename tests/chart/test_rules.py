"""Recording rules and alerts, by Prometheus' own promtool."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.conftest import ROOT, Object, Rendered, tool
from tests.chart.schemas import available, problems

Render = Callable[..., Rendered]

RULES = Path(__file__).parent / "rules"
RUNBOOK = ROOT / "docs" / "runbook.md"
ON: Object = {"enabled": True, "runbookUrl": "https://example.com/runbook.md"}


def rules(release: Rendered) -> list[Object]:
    groups = release.one("PrometheusRule")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [tool("promtool"), *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(render: Render, tmp_path: Path) -> Path:
    """A folder with the rules as Prometheus reads them."""
    spec = render({"metrics": {"rules": ON}}, name="t5").one("PrometheusRule")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path


def test_prometheus_takes_the_rules(folder: Path) -> None:
    assert "SUCCESS" in promtool(folder, "check", "rules", "rules.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in RULES.glob("*.yaml")))
def test_rules_on_made_up_series(folder: Path, name: str) -> None:
    shutil.copy(RULES / f"{name}.yaml", folder)
    promtool(folder, "test", "rules", f"{name}.yaml")


def test_every_rule_has_a_test(render: Render) -> None:
    tested = "".join(path.read_text() for path in RULES.glob("*.yaml"))
    for rule in rules(render({"metrics": {"rules": ON}})):
        name = rule.get("alert") or rule["record"]
        # The windows between the shortest and the longest are the same expression.
        if not re.fullmatch(r"t5:http_errors:ratio_rate(30m|1h|2h|6h)|t5:queue_ms:p9.*", name):
            assert re.search(rf"\b{name}\b", tested), name


def test_the_operator_takes_the_rules(render: Render) -> None:
    rule = render({"metrics": {"rules": ON}}).one("PrometheusRule")
    assert available(rule)
    assert problems(rule) == []


def test_every_alert_has_a_severity_and_a_section_of_the_runbook(render: Render) -> None:
    release = render({"metrics": {"rules": ON}})
    alerts = [rule for rule in rules(release) if "alert" in rule]
    sections = re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sections == [alert["alert"] for alert in alerts]
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning")
        said = alert["annotations"]
        assert said["summary"]
        assert said["runbook"]
        anchor = alert["alert"].lower()
        assert said["runbook_url"] == f"https://example.com/runbook.md#{anchor}"


def test_without_an_address_there_is_no_runbook_url(render: Render) -> None:
    release = render({"metrics": {"rules": {"enabled": True}}})
    alerts = [rule for rule in rules(release) if "alert" in rule]
    assert all("runbook_url" not in alert["annotations"] for alert in alerts)


def test_rules_are_off_by_default(render: Render) -> None:
    assert render().all("PrometheusRule") == []


@pytest.mark.parametrize(
    ("values", "alert", "said"),
    [
        ({"objectivePercent": 99.9}, "T5ErrorBudgetBurnsFast", "> 0.0144"),
        ({"queueSeconds": 15}, "T5QueueGrows", "> 15"),
        ({"noProgressSeconds": 7}, "T5NoProgress", "> 7"),
        ({"shedPercent": 1}, "T5RequestsShed", "> 0.01"),
        ({"scaleChanges": 9}, "T5ReplicasFlap", "> 9"),
        ({"healthFailures": 8}, "T5ReplicasUnhealthy", ">= 8"),
        ({"gpuIdlePercent": 33}, "T5GpuIdleWhileQueued", "< 33"),
    ],
)
def test_thresholds_are_values(render: Render, values: Any, alert: str, said: str) -> None:
    release = render({"metrics": {"rules": {"enabled": True, **values}}})
    [rule] = [rule for rule in rules(release) if rule.get("alert") == alert]
    assert said in rule["expr"]


def test_the_most_replicas_are_the_autoscalers(render: Render) -> None:
    values: Object = {"summarizer": {"autoscaling_config": {"max_replicas": 7}}}
    release = render({"metrics": {"rules": ON}, **values})
    [rule] = [rule for rule in rules(release) if rule.get("alert") == "T5ReplicasAtMax"]
    assert re.findall(r">=? (\d+)", rule["expr"]) == ["7", "7"]
