"""schemathesis against the service: what its OpenAPI document says is what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.integration.conftest import Deploy, Service

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
# A deadline may pass before the summary is done, however valid the request.
CONFIG = """\
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "408"]
"""
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def bounded(deploy: Deploy) -> Service:
    """Takes no request that would keep this machine busy for long."""
    return deploy(
        "fuzzed",
        "/fuzzed",
        limits={"max_new_tokens": 24, "num_beams": 2, "batch_texts": 3, "timeout_s": 120},
    )


def fuzz(
    service: Service, folder: Path, *options: str, document: str | None = None
) -> subprocess.CompletedProcess[str]:
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    return subprocess.run(
        [
            SCHEMATHESIS,
            f"--config-file={config}",
            "run",
            document or f"{service.url}/openapi.json",
            f"--url={service.url}",
            f"--header=Authorization: Bearer {service.token}",
            "--checks=all",
            "--mode=all",
            "--seed=1",
            "--generation-deterministic",
            "--continue-on-failure",
            "--no-color",
            *options,
        ],
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.integration.openapi_fuzz_hooks"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_service_does_what_its_document_says(bounded: Service, tmp_path: Path) -> None:
    done = fuzz(bounded, tmp_path, "--max-examples=25")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 selected / 6 total" in done.stdout
    bounded.idle()
    assert bounded.post("/v1/summarize", {"text": "A small web server."}).status_code == 200


def test_a_document_that_is_wrong_is_found(bounded: Service, tmp_path: Path) -> None:
    document = httpx.get(f"{bounded.url}/openapi.json").json()
    del document["paths"]["/hf/summarization"]["post"]["responses"]["422"]
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(document))
    options = ("--include-path=/hf/summarization", "--phases=coverage")
    done = fuzz(bounded, tmp_path, *options, document=str(wrong))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Undocumented" in done.stdout
    assert "[422]" in done.stdout
