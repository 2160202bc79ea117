"""The quality gate inside an image: a tiny one, whose `python` says what it is given to say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.test_gate import gate, prepare, weights

# Stands for Python and the runner: counts the texts it is given, then prints /rows.jsonl.
PYTHON = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int count, char **given) {
    int lines = 0, c;
    while ((c = getchar()) != EOF) lines += c == '\n';
    if (count < 3 || strcmp(given[1], "-c") || !getenv("HF_HUB_OFFLINE")) return 3;
    if (count > 3) { fprintf(stderr, "no such model %s\n", given[4]); return 2; }
    if (lines != 14) { fprintf(stderr, "%d texts\n", lines); return 4; }
    FILE *rows = fopen("/rows.jsonl", "r");
    while ((c = fgetc(rows)) != EOF) putchar(c);
    if (getenv("CRASH")) { fprintf(stderr, "out of memory\n"); return 7; }
    return 0;
}
"""


@dataclass(frozen=True)
class Store:
    """A store of buildah's of its own, without anything in it."""

    settings: Path

    def __call__(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            ["buildah", *map(str, arguments)],
            env={**os.environ, **self.environment},
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    @property
    def environment(self) -> dict[str, str]:
        return {"CONTAINERS_STORAGE_CONF": str(self.settings)}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "python.c").write_text(PYTHON)
    build = ["cc", "-static", "-o", str(folder / "python"), str(folder / "python.c")]
    if not shutil.which("cc") or subprocess.run(build, capture_output=True).returncode:
        pytest.skip("no compiler that links statically")
    return folder / "python"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, program: Path) -> Iterator[Store]:
    """With images t5.local/good and t5.local/crash."""
    if not shutil.which("buildah"):
        pytest.skip("no buildah")
    folder = tmp_path_factory.mktemp("store")
    made = Store(folder / "storage.conf")
    made.settings.write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/root"\nrunroot = "{folder}/run"\n'
    )
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in _rows(prepare(folder))))
    container = made("from", "scratch")
    made("copy", "--chmod", "0755", container, program, "/bin/python")
    made("copy", container, rows, "/rows.jsonl")
    made("config", "--env", "PATH=/bin", container)
    made("commit", "--quiet", container, "t5.local/good:1")
    made("config", "--env", "CRASH=1", container)
    made("commit", "--quiet", "--rm", container, "t5.local/crash:1")
    yield made
    made("rm", "--all")
    made("rmi", "--all", "--force")


def _rows(folder: Path) -> list[dict[str, object]]:
    """What a model would write whose summaries are the synopses."""
    texts = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    rows: list[dict[str, object]] = [
        {"model": "demo", "weights": weights(), "parameters": 1, "device": "cpu", "versions": {}}
    ]
    for run in ("served", "float32", "reference"):
        rows.append({"run": run, "dtype": "float32"})
        for search in ("greedy", "beams"):
            about = {"run": run, "search": search, "tokens": [1, 2], "ended": True}
            rows += [{**about, "id": text["id"], "text": text["synopsis"]} for text in texts]
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def test_what_the_image_says_is_judged(store: Store, folder: Path) -> None:
    ended = gate(folder, "t5.local/good:1", **store.environment)
    assert (ended.status, ended.failed) == (0, []), ended.stderr
    report = ended.report
    assert report["image"]["name"] == "t5.local/good:1"
    listed = store("images", "--quiet", "--no-trunc", "t5.local/good:1")
    assert listed == f"sha256:{report['image']['id']}"
    # Summaries that are their own references.
    assert report["figures"]["served"]["greedy"]["rougeL"] == pytest.approx(100)
    assert store("containers", "--quiet") == ""


def test_a_layout_is_named_by_the_digest_that_is_pushed(store: Store, folder: Path) -> None:
    layout = folder / "layout"
    store("push", "--quiet", "t5.local/good:1", f"oci:{layout}:1")
    index = json.loads((layout / "index.json").read_text())
    ended = gate(folder, f"oci:{layout}:1", **store.environment)
    assert ended.status == 0, ended.stderr
    assert ended.report["image"]["digest"] == index["manifests"][0]["digest"]
    assert store("containers", "--quiet") == ""


def test_an_image_that_breaks_off_has_failed(store: Store, folder: Path) -> None:
    ended = gate(folder, "t5.local/crash:1", **store.environment)
    assert ended.status == 1
    assert len(ended.failed) == 1
    assert "out of memory" in ended.failed[0]
    assert ended.report["verdict"] == "failed"
    assert store("containers", "--quiet") == ""


def test_a_model_that_the_image_lacks_is_wrong_use(store: Store, folder: Path) -> None:
    ended = gate(folder, "t5.local/good:1", "--model", "/models/own", **store.environment)
    assert ended.status == 2
    assert "no such model /models/own" in ended.stderr
    assert store("containers", "--quiet") == ""


def test_an_earlier_verdict_does_not_stay(store: Store, folder: Path) -> None:
    (folder / "dist").mkdir()
    (folder / "dist/gate.json").write_text('{"verdict": "passed"}')
    ended = gate(folder, "t5.local/absent:1", **store.environment)
    assert ended.status == 2
    assert "t5.local/absent:1" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (folder / "dist/gate.json").exists()
