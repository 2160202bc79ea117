"""A replica's service model: the fit against known truths, the meter against the real engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import yaml

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.protocol import Event
from serve_app.tuning.model import Decode, Encode, ServiceModel, load_model
from serve_app.tuning.profile import ProfileError, Unit, _Meter, fit, throughput

ROOT = Path(__file__).resolve().parents[2]
TRUTH = np.array([0.002, 1e-4, 2e-8, 0.001, 0.0002, 5e-7])


def units() -> list[Unit]:
    return [
        Unit(entered * length, entered * length**2, rows, rows * length)
        for length in (32, 128, 256, 512)
        for rows in (1, 2, 4, 8, 16)
        for entered in (0, 1, rows)
    ]


def took(unit: Unit) -> float:
    return float(
        TRUTH[0] * (unit.encoded > 0)
        + TRUTH[1] * unit.encoded
        + TRUTH[2] * unit.squares
        + TRUTH[3]
        + TRUTH[4] * unit.rows
        + TRUTH[5] * unit.source
    )


def test_a_model_is_found_again_though_some_units_were_held_up() -> None:
    rng = np.random.default_rng(1)
    seen = {}
    for at, unit in enumerate(units()):
        times = took(unit) * rng.normal(1, 0.01, 9)
        if at % 6 == 0:
            times = times + 0.05
        seen[unit] = times.tolist()
    found, error, kinds = fit(seen)
    assert kinds == len(seen)
    assert error < 0.02
    predicted = [float(np.dot(unit.terms(), found)) for unit in units()]
    assert predicted == pytest.approx([took(unit) for unit in units()], rel=0.05)


def test_no_coefficient_is_negative() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        seen = {unit: [took(unit) * rng.lognormal(0, 0.5)] for unit in units()}
        found, _, _ = fit(seen)
        assert found.min() >= 0


def test_too_little_is_no_model() -> None:
    steps_only = {unit: [took(unit)] * 5 for unit in units() if not unit.encoded}
    with pytest.raises(ProfileError, match="only 0 kinds of work with encoding and 20 without"):
        fit(steps_only)


def test_the_meter_accounts_for_every_document_and_step(checkpoint: Checkpoint) -> None:
    events: SimpleQueue[list[Event]] = SimpleQueue()
    engine = ContinuousEngine(
        checkpoint, events.put, threads=1, max_batch_size=4, max_batch_tokens=64, speculation=False
    )
    lengths, steps = [10, 20, 30, 12, 16, 8], 5
    try:
        seen = [unit for unit, _ in _Meter(engine, events).run(lengths, steps)]
    finally:
        engine.close()
    assert sum(unit.encoded for unit in seen) == sum(lengths)
    assert sum(unit.squares for unit in seen) == sum(length**2 for length in lengths)
    assert sum(unit.rows for unit in seen) == len(lengths) * steps
    assert sum(unit.source for unit in seen) == sum(lengths) * steps
    assert max(unit.rows for unit in seen) == 4


def test_throughput_counts_what_others_have_encoded_meanwhile() -> None:
    model = ServiceModel(
        encode=Encode(call_s=0.01, token_s=0.0001),
        decode=Decode(step_s=0.001, row_s=0.002, source_token_s=0),
        overhead_s=0.5,
        rows=4,
    )
    # 10 steps of 3, 5, 9 ms; each request's encoding takes 20 ms.
    assert throughput(model, 100, 10) == [
        (1, pytest.approx(0.55), pytest.approx(1 / 0.55)),
        (2, pytest.approx(0.59), pytest.approx(2 / 0.59)),
        (4, pytest.approx(0.67), pytest.approx(4 / 0.67)),
    ]


def profiled(*args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app.cli.main", "tune", "profile", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=280,
    )


def test_the_command_writes_a_model_that_simulation_takes(tmp_path: Path) -> None:
    """How good it is depends on what else the machine does, which the exit status tells."""
    done = profiled("--seconds", "1", "--rows", "8")
    said = done.stderr.decode()
    assert done.returncode in (0, 1), said
    assert ("was the machine busy" in said) == (done.returncode == 1)
    file = tmp_path / "replica.yaml"
    file.write_bytes(done.stdout)
    model = load_model(file)
    assert (model.rows, model.max_input_tokens) == (8, 512)
    assert yaml.safe_load(done.stdout)["name"] == "demo, auto, 1 threads"
    assert "a mixed load: " in said


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    done = profiled("--model", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
