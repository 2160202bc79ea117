"""`t5-serve tune verify` on a Ray of its own: both sides are told, of the same requests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
def test_a_short_load_live_and_simulated(tmp_path: Path) -> None:
    # Not tmp_path: the paths of Ray's sockets must stay below 108 bytes.
    folder = tempfile.mkdtemp(prefix="t5", dir="/tmp")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("T5_SERVE", "RAY_"))
    }
    environment = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "HOME": folder,  # Ray's own token goes there
        "RAY_TMPDIR": folder,
        "T5_SERVE_TOKENS_FILE": f"{folder}/conf/tokens.json",
    }
    model, html = tmp_path / "replica.yaml", tmp_path / "verify.html"
    model.write_text("name: any\n")
    options = [
        *("--duration", "8", "--rate", "3", "--probes", "3", "--input-tokens", "40"),
        *("--output-tokens", "20", "--set", "look_back_period_s=2", "--set", "push_interval_s=1"),
        *("--set", "max_replicas=1", "--max-lag", "60", "--tolerance", "1000"),
        *("--replica-tolerance", "10", "--model", str(model), "--html", str(html), "--json"),
    ]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "serve_app.cli.main", "tune", "verify", *options],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    live, simulated = told["live"], told["simulated"]
    assert live["requests"] == simulated["requests"] > 0
    assert live["succeeded"] == live["requests"]
    for side in (live, simulated):
        assert side["p50_s"] > 0
        assert side["p95_s"] >= side["p50_s"]
        assert side["replicas_mean"] == 1
    assert told["timeline_distance"] == 0
    assert told["p95_error"] == pytest.approx(simulated["p95_s"] / live["p95_s"] - 1)
    assert html.exists()
    # Its Ray has gone with it.
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(folder in part for part in process.info["cmdline"] or [])
    ]
    assert left == []
