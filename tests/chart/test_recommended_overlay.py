"""What `t5-serve tune recommend` writes is taken by the chart, and reaches Serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.tuning.model import Scaling
from serve_app.tuning.overlay import overlay, overlay_text


@pytest.mark.parametrize(
    "scaling",
    [
        Scaling(),
        Scaling(
            min_replicas=3,
            max_replicas=40,
            target_ongoing_requests=4.5,
            upscale_delay_s=7.2,
            downscale_delay_s=120,
            upscaling_factor=1.5,
            downscaling_factor=0.4,
            look_back_period_s=11,
            aggregation_function="max",
        ),
        Scaling(max_replicas=9, signal="tokens", target_drain_s=1.5),
    ],
)
def test_the_overlay_is_what_serve_gets(
    tmp_path: Path, render: Callable[..., Any], scaling: Scaling
) -> None:
    file = tmp_path / "overlay.yaml"
    current = Scaling(initial_replicas=2)
    file.write_text(overlay_text(overlay(scaling, current, {}), ["made by a test"]))
    before = tmp_path / "before.yaml"
    before.write_text("summarizer: {autoscaling_config: {initial_replicas: 2}}\n")
    rendered = render(None, before, file)
    config = rendered.deployment("Summarizer")["autoscaling_config"]
    policy = config.pop("policy", None)
    wanted = scaling.model_dump(exclude_none=True, include=set(config))
    assert wanted.items() <= config.items()
    assert set(config) - set(wanted) == {"initial_replicas"}
    if scaling.signal == "tokens":
        kwargs = {"target_drain_s": scaling.target_drain_s}
        assert policy == {
            "policy_function": "serve_app.scaling:TokenPolicy",
            "policy_kwargs": kwargs,
        }
    else:
        assert policy is None
    assert scaling.min_replicas <= config["initial_replicas"] <= scaling.max_replicas


def test_every_setting_that_is_searched_is_the_charts(
    tmp_path: Path, render: Callable[..., Any]
) -> None:
    said = overlay(Scaling(), Scaling(), {})["summarizer"]["autoscaling_config"]
    config = render().deployment("Summarizer")["autoscaling_config"]
    assert set(config) - set(said) == {"initial_replicas"}


def test_requests_are_taken_up_again(tmp_path: Path, render: Callable[..., Any]) -> None:
    before, file = tmp_path / "before.yaml", tmp_path / "overlay.yaml"
    before.write_text("summarizer: {autoscaling_config: {signal: tokens, target_drain_s: 1}}\n")
    current = Scaling(signal="tokens", target_drain_s=1)
    file.write_text(overlay_text(overlay(Scaling(), current, {}), ["made by a test"]))
    assert "policy" in render(None, before).deployment("Summarizer")["autoscaling_config"]
    assert "policy" not in render(None, before, file).deployment("Summarizer")["autoscaling_config"]
