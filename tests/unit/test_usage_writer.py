"""Writing usage events: whole, in order, bounded, and never in the way."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.usage import writer as writer_module
from serve_app.usage.folder import begin_segment, default_usage_folder, segments
from serve_app.usage.writer import UsageWriter


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in segments(folder) for line in path.open()]


def make(folder: Path, **options: Any) -> UsageWriter:
    given = {"max_bytes": 1 << 20, "keep": 4, "queue_size": 100_000, **options}
    return UsageWriter(folder, **given)


class Gate:
    """Holds the writer's thread at the door of the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived, self.open = threading.Event(), threading.Event()
        real = UsageWriter._append

        def held(self_: UsageWriter, lines: bytes) -> None:
            self.arrived.set()
            self.open.wait()
            real(self_, lines)

        monkeypatch.setattr(UsageWriter, "_append", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


def test_events_are_written_in_order_with_what_is_common(tmp_path: Path) -> None:
    usage = make(tmp_path / "new" / "folder", common={"replica": "r1"})
    for number in range(1000):
        usage.record({"number": number})
    usage.close()
    found = events(tmp_path / "new" / "folder")
    assert [event["number"] for event in found] == list(range(1000))
    assert {event["replica"] for event in found} == {"r1"}
    assert all("dropped_events" not in event for event in found)


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    usage = make(tmp_path, keep=100, max_bytes=65_536)

    def work(who: int) -> None:
        for number in range(500):
            usage.record({"who": who, "number": number})

    threads = [threading.Thread(target=work, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    usage.close()
    found = events(tmp_path)
    for who in range(8):
        assert [one["number"] for one in found if one["who"] == who] == list(range(500))


def test_what_finds_the_queue_full_is_dropped_and_counted(tmp_path: Path, gate: Gate) -> None:
    dropped: list[int] = []
    usage = make(tmp_path, queue_size=3, on_drop=dropped.append)
    usage.record({"number": 0})
    assert gate.arrived.wait(60)  # the first is with the disk, the queue is empty
    for number in range(1, 9):
        usage.record({"number": number})
    gate.open.set()
    usage.close()
    found = events(tmp_path)
    assert [event["number"] for event in found] == [0, 1, 2, 3]
    assert [event.get("dropped_events") for event in found] == [None, 5, None, None]
    assert sum(dropped) == 5


def test_what_cannot_be_written_is_counted_in_the_next_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    failed = threading.Event()
    broken = True

    def begin(folder: Path) -> Any:
        if broken:
            raise OSError(28, "No space left on device")
        return begin_segment(folder)

    monkeypatch.setattr(writer_module, "begin_segment", begin)

    def on_drop(count: int) -> None:
        dropped.append(count)
        failed.set()

    usage = make(tmp_path, on_drop=on_drop)
    usage.record({"number": 0})
    assert failed.wait(60)
    broken = False
    usage.record({"number": 1})
    usage.close()
    assert events(tmp_path) == [{"number": 1, "dropped_events": 1}]
    assert dropped == [1]


def test_when_its_folder_is_removed_it_goes_on_in_a_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    usage = make(folder)
    usage.record({"number": 0})
    while not events(folder):
        time.sleep(0.01)
    shutil.rmtree(folder)
    usage.record({"number": 1})
    usage.close()
    assert events(folder) == [{"number": 1}]


def test_after_its_end_a_writer_drops(tmp_path: Path) -> None:
    dropped: list[int] = []
    usage = make(tmp_path, on_drop=dropped.append)
    usage.close()
    usage.close()
    usage.record({"number": 1})
    assert dropped == [1]
    assert events(tmp_path) == []


def test_segments_are_bounded_in_size_and_number(tmp_path: Path) -> None:
    usage = make(tmp_path, max_bytes=65_536, keep=3)
    for number in range(20_000):
        usage.record({"number": number})
    usage.close()
    kept = segments(tmp_path)
    assert len(kept) == 3
    assert all(path.stat().st_size <= 65_536 for path in kept)
    numbers = [event["number"] for event in events(tmp_path)]
    # What is left is the end, without a gap.
    assert numbers == list(range(numbers[0], 20_000))


def test_a_segment_in_use_is_not_removed(tmp_path: Path) -> None:
    idle = make(tmp_path, keep=2)
    idle.record({"who": "idle"})
    while not segments(tmp_path):
        time.sleep(0.01)
    [first] = segments(tmp_path)
    busy = make(tmp_path, max_bytes=65_536, keep=2)
    for number in range(20_000):
        busy.record({"who": "busy", "number": number})
    busy.close()
    assert first in segments(tmp_path)
    idle.record({"who": "idle"})
    idle.close()
    assert first.read_text().count("idle") == 2
    # Once it is closed, it goes like any other.
    last = make(tmp_path, keep=2)
    last.record({"who": "last"})
    last.close()
    assert first not in segments(tmp_path)


def test_only_the_user_can_read_them(tmp_path: Path) -> None:
    usage = make(tmp_path / "usage")
    usage.record({"number": 1})
    usage.close()
    [segment] = segments(tmp_path / "usage")
    assert (tmp_path / "usage").stat().st_mode & 0o077 == 0
    assert segment.stat().st_mode & 0o077 == 0


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("T5_SERVE_USAGE_FOLDER", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/invalid")
    assert default_usage_folder() == tmp_path / ".local/state/t5-serve/usage"
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert default_usage_folder() == Path("/var/state/t5-serve/usage")
    monkeypatch.setenv("T5_SERVE_USAGE_FOLDER", "~/here")
    assert default_usage_folder() == tmp_path / "here"
