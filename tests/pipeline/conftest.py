"""A Google Cloud project that only exists in a file, and `kuberay/gcp/bootstrap` run against it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kuberay.gcp.plan import Command, Plan, Step
from kuberay.gcp.settings import Settings, read
from kuberay.gcp.steps import plan
from tests.pipeline import fake_gcloud

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "kuberay/gcp/settings.env.example"


class Cloud:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "project.json"
        self.settings = folder / "settings.env"
        self.settings.write_text(EXAMPLE.read_text())
        programs = folder / "bin"
        programs.mkdir()
        source = Path(fake_gcloud.__file__).read_text()
        for name in ("gcloud", "bq"):
            program = programs / name
            program.write_text(f"#!{sys.executable} -IS\n{source}")
            program.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:/usr/bin:/bin",
            "FAKE_PROJECT": str(self.file),
            "FAKE_CALLS": str(folder / "calls"),
        }

    def bootstrap(self, *options: str, failure: str = "") -> subprocess.CompletedProcess[str]:
        program = str(ROOT / "kuberay/gcp/bootstrap")
        return self.shell(
            sys.executable, program, "--settings", str(self.settings), *options, failure=failure
        )

    def shell(self, *argv: str, failure: str = "") -> subprocess.CompletedProcess[str]:
        (self.folder / "calls").unlink(missing_ok=True)
        return subprocess.run(
            argv,
            cwd=ROOT,
            env={**self.environment, "FAKE_FAILURE": failure},
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[list[str]]:
        """The command lines since the last start."""
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def changes(self) -> list[list[str]]:
        return [call for call in self.calls() if not fake_gcloud.READING.intersection(call)]

    def state(self) -> Any:
        return json.loads(self.file.read_text())

    def edit(self, thing: str, **facts: Any) -> None:
        """Somebody else changes something."""
        state = self.state()
        state["things"][thing] |= facts
        self.file.write_text(json.dumps(state))


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the file holds of a project that was made ready without a hitch."""
    cloud = Cloud(tmp_path_factory.mktemp("made"))
    done = cloud.bootstrap("--run")
    assert done.returncode == 0, done.stderr
    return cloud.file.read_text()


@pytest.fixture
def ready(cloud: Cloud, made: str) -> Cloud:
    """A project that has been made ready."""
    cloud.file.write_text(made)
    return cloud


@pytest.fixture(scope="session")
def settings() -> Settings:
    return read(EXAMPLE)


def commands(steps: Plan) -> Iterator[Command]:
    for item in steps:
        if isinstance(item, Step):
            yield from filter(None, (item.look, item.make, item.change))
        else:
            yield item.read


@pytest.fixture(scope="session")
def all_commands(settings: Settings) -> list[list[str]]:
    """Each command line that a plan may run, with and without a key."""
    both = [*commands(plan(settings)), *commands(plan(settings, "/tmp/key.json"))]
    return [list(argv) for argv in dict.fromkeys(command.argv for command in both)]
