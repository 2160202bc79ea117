"""Faults inside a replica of the real service: it is replaced, and no request hangs or is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from ray import cloudpickle
from ray.exceptions import RayActorError

from serve_app import app, summarizer
from serve_app.engine import continuous
from serve_app.engine.checkpoint import Checkpoint, resolve
from serve_app.engine.runner import Plan, Runner
from serve_app.engine.tokenizer import Tokenizer
from tests.integration.conftest import Deploy, Service, until
from tests.texts import texts

TEXT = texts(1)[0]
SOME = {"max_new_tokens": 24}
# What a text begins with that has this effect on the engine that decodes it.
MARKERS = {
    "hang": "Zebra zebra zebra.",
    "scheduler": "Quartz quartz quartz.",
    "device": "Fjord fjord fjord.",
    "kill": "Xylem xylem xylem.",
}


class Faulty:
    """A runner that breaks when a document with a marker is in the batch.

    Where the folder has a file with the marker's name, only the first replica to take it away does.
    """

    def __init__(self, runner: Runner, checkpoint: Checkpoint, folder: Path) -> None:
        tokenizer = Tokenizer(checkpoint)
        self._runner = runner
        self._folder = folder
        # Without the end, whose tokens may depend on what follows.
        self._marks = {
            name: ",".join(map(str, tokenizer.encode(checkpoint.prefix + said).ids[:-1]))
            for name, said in MARKERS.items()
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(self, only: Any = None) -> Any:
        for entry in self._runner.entries:
            ids = ",".join(map(str, entry.request.input_ids))
            for name, mark in self._marks.items():
                if ids.startswith(mark) and self._takes_effect(name):
                    self._break(name)
        return self._runner.step(only)

    def leave(self, entries: Any) -> None:
        if getattr(self, "_scheduler", False):
            raise AssertionError("a fault in the scheduler")
        self._runner.leave(entries)

    def _takes_effect(self, name: str) -> bool:
        once = self._folder / f"{name}-once"
        if not once.exists():
            return not (self._folder / f"{name}-never").exists()
        once.rename(self._folder / f"{name}-never")
        return True

    def _break(self, name: str) -> None:
        if name == "hang":
            time.sleep(10_000)
        elif name == "scheduler":
            self._scheduler = True
        elif name == "device":
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        else:
            os.kill(os.getpid(), signal.SIGKILL)


class Summarizer(summarizer.Summarizer):
    """A Summarizer whose engine's runner is `Faulty`; its usage folder says where the files are."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        real, folder = continuous.make_runner, Path(settings["usage"]["folder"])

        def make(checkpoint: Checkpoint, plan: Plan) -> Any:
            return Faulty(real(checkpoint, plan), checkpoint, folder)

        continuous.make_runner = make
        await super().__init__(settings)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def faulty(deploy: Deploy, faults: Path) -> Service:
    # Replicas cannot import this module.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "Summarizer", Summarizer)
        return deploy(
            "faulty",
            "/faulty",
            auth="off",
            usage={"folder": str(faults)},
            engine={"stall_s": 10, "speculation": False},
            replicas={"min": 2, "max": 2, "health_check_period_s": 0.5},
            limits={"max_new_tokens": 4_000},
        )


def marked(name: str, **options: Any) -> dict[str, Any]:
    return {"text": f"{MARKERS[name]} {TEXT}", **SOME, **options}


def plain(index: int, **options: Any) -> dict[str, Any]:
    return {"text": texts(8)[index % 8], **SOME, **options}


def pids(service: Service) -> set[int]:
    """Processes that answer, which one that is about to be killed may not."""
    found: set[int] = set()
    for _ in range(12):
        with suppress(RayActorError):
            found.add(service.probe().pid)
    return found


def two(service: Service) -> set[int]:
    """The processes of both replicas, once there are two."""
    found: set[int] = until(
        lambda: now if len(now := pids(service)) == 2 else None, "there are two replicas", 240
    )
    return found


def kind(answer: httpx.Response) -> str:
    return str(answer.json().get("type", "")).removeprefix("urn:t5-serve:problem:")


@pytest.mark.parametrize("name", ["scheduler", "device"])
def test_an_engine_that_breaks_is_replaced_and_its_requests_run_elsewhere(
    faulty: Service, faults: Path, name: str
) -> None:
    before = two(faulty)
    (faults / f"{name}-once").touch()
    with ThreadPoolExecutor(8) as pool:
        guilty = pool.submit(faulty.post, "/v1/summarize", marked(name, timeout_s=280))
        others = [
            pool.submit(faulty.post, "/v1/summarize", plain(i, timeout_s=280)) for i in range(7)
        ]
        answers = [future.result() for future in (guilty, *others)]
    assert {answer.status_code for answer in answers} == {200}
    assert (faults / f"{name}-never").exists()  # it did break
    assert len(two(faulty) & before) == 1
    # What the first replica had done of it is on no bill.
    again = faulty.post("/v1/summarize", marked(name)).json()
    for count in ("input_tokens", "output_tokens"):
        assert answers[0].json()["usage"][count] == again["usage"][count]


def test_an_engine_that_hangs_is_replaced_and_nobody_waits_past_the_deadline(
    faulty: Service, faults: Path
) -> None:
    before = two(faulty)
    (faults / "hang-once").touch()
    with ThreadPoolExecutor(8) as pool:
        guilty = pool.submit(faulty.post, "/v1/summarize", marked("hang", timeout_s=10))
        until(lambda: (faults / "hang-never").exists(), "an engine hangs")
        others = [
            pool.submit(faulty.post, "/v1/summarize", plain(i, timeout_s=280)) for i in range(7)
        ]
        late = guilty.result()
        answers = [future.result() for future in others]
    assert (late.status_code, kind(late)) == (408, "deadline")
    assert {answer.status_code for answer in answers} == {200}
    until(lambda: len(pids(faulty) & before) == 1, "the one that hung is gone", 240)


def test_a_text_that_kills_two_replicas_is_refused_and_kills_no_third(faulty: Service) -> None:
    before = two(faulty)
    answer = faulty.post("/v1/summarize", marked("kill", timeout_s=280))
    assert (answer.status_code, kind(answer)) == (422, "poison")
    after = two(faulty)
    assert not after & before
    for _ in range(3):
        again = faulty.post("/v1/summarize", marked("kill"))
        assert (again.status_code, kind(again)) == (422, "poison")
    assert two(faulty) == after
    assert faulty.post("/v1/summarize", plain(0)).status_code == 200


def test_the_markers_are_in_the_texts_tokens() -> None:
    checkpoint = resolve("demo", None)
    tokenizer = Tokenizer(checkpoint)
    for name, said in MARKERS.items():
        whole = tokenizer.encode(f"{checkpoint.prefix}{marked(name)['text']}").ids
        mark = tokenizer.encode(checkpoint.prefix + said).ids[:-1]
        assert len(mark) > 3
        assert whole[: len(mark)] == mark
