"""The sidecar's tail: every line once, whatever is stopped, killed, begun anew or removed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from serve_app.usage.folder import segments
from serve_app.usage.tail import Tail
from serve_app.usage.writer import UsageWriter

ROOT = Path(__file__).resolve().parents[2]


def segment(folder: Path, name: str, text: str) -> Path:
    path = folder / f"usage-{name}.jsonl"
    path.write_text(text)
    return path


def passed(folder: Path) -> str:
    """What a tail that starts now passes on."""
    out = io.BytesIO()
    Tail(folder, out).drain()
    return out.getvalue().decode()


def test_lines_are_passed_on_once_across_restarts(tmp_path: Path) -> None:
    first = segment(tmp_path, "1", "a\nb\n")
    assert passed(tmp_path) == "a\nb\n"
    assert passed(tmp_path) == ""
    with first.open("a") as file:
        file.write("c\n")
    segment(tmp_path, "2", "d\n")
    assert passed(tmp_path) == "c\nd\n"
    assert passed(tmp_path) == ""


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = segment(tmp_path, "1", "a\nhal")
    assert passed(tmp_path) == "a\n"
    with path.open("a") as file:
        file.write("f\n")
    assert passed(tmp_path) == "half\n"


def test_a_folder_that_comes_later(tmp_path: Path) -> None:
    out = io.BytesIO()
    passing = Tail(tmp_path / "later", out)
    assert passing.pass_on() == 0
    (tmp_path / "later").mkdir()
    segment(tmp_path / "later", "1", "a\n")
    passing.drain()
    assert out.getvalue() == b"a\n"


def test_a_segment_larger_than_one_read(tmp_path: Path) -> None:
    text = "".join(f"{number:099d}\n" for number in range(30_000))  # 3 MB
    segment(tmp_path, "1", text)
    assert passed(tmp_path) == text


def test_removed_segments_are_forgotten(tmp_path: Path) -> None:
    gone = segment(tmp_path, "1", "a\n")
    segment(tmp_path, "2", "b\n")
    passed(tmp_path)
    gone.unlink()
    segment(tmp_path, "3", "c\n")
    assert passed(tmp_path) == "c\n"
    assert json.loads((tmp_path / "tail.checkpoint").read_text()) == {
        "usage-2.jsonl": 2,
        "usage-3.jsonl": 2,
    }


@pytest.mark.parametrize("content", ["", "{", "[]", '{"usage-1.jsonl": "x"}', "\0"])
def test_a_checkpoint_that_makes_no_sense_repeats_rather_than_loses(
    tmp_path: Path, content: str
) -> None:
    segment(tmp_path, "1", "a\n")
    (tmp_path / "tail.checkpoint").write_text(content)
    assert passed(tmp_path) == "a\n"


def test_killed_before_its_checkpoint_a_tail_repeats(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def flush(self) -> None:
            raise BrokenPipeError

    segment(tmp_path, "1", "a\n")
    with pytest.raises(BrokenPipeError):
        Tail(tmp_path, Full()).pass_on()
    assert passed(tmp_path) == "a\n"


def test_it_follows_a_writer_over_its_segments(tmp_path: Path) -> None:
    out, stop = io.BytesIO(), threading.Event()
    passing = Tail(tmp_path, out)
    thread = threading.Thread(target=passing.follow, args=(stop,))
    thread.start()
    writer = UsageWriter(tmp_path, max_bytes=65_536, keep=1000, queue_size=100_000)
    for number in range(20_000):
        writer.record({"number": number})
    writer.close()
    stop.set()
    thread.join()
    assert len(segments(tmp_path)) > 3
    numbers = [json.loads(line)["number"] for line in out.getvalue().splitlines()]
    assert numbers == list(range(20_000))


def tail(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    arguments = ["usage", "tail", "--folder", str(folder), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "serve_app.cli.main", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )


def test_stopped_and_started_again_it_repeats_and_loses_nothing(tmp_path: Path) -> None:
    writer = UsageWriter(tmp_path, max_bytes=65_536, keep=1000, queue_size=100_000)
    seen: list[bytes] = []
    for round_ in range(3):
        process = tail(tmp_path, "--follow")
        assert process.stdout is not None
        for number in range(2_000):
            writer.record({"number": round_ * 2_000 + number})
        # Stopped in the middle, as soon as anything has come.
        seen.append(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        seen += process.stdout.readlines()
        assert process.wait(60) == 0
    writer.close()
    rest = tail(tmp_path)
    seen += rest.communicate(timeout=60)[0].splitlines()
    assert rest.returncode == 0
    assert [json.loads(line)["number"] for line in seen] == list(range(6_000))


def test_killed_it_repeats_lines_and_loses_none(tmp_path: Path) -> None:
    writer = UsageWriter(tmp_path, max_bytes=65_536, keep=1000, queue_size=100_000)
    for number in range(5_000):
        writer.record({"number": number})
    writer.close()
    process = tail(tmp_path, "--follow")
    assert process.stdout is not None
    seen = [process.stdout.readline()]
    process.kill()
    # A line may have been cut off; whoever collects lines does not count it.
    seen += [line for line in process.stdout.readlines() if line.endswith(b"\n")]
    process.wait(60)
    rest = tail(tmp_path).communicate(timeout=60)[0].splitlines()
    numbers = {json.loads(line)["number"] for line in [*seen, *rest]}
    assert numbers == set(range(5_000))


def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tail.checkpoint").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.cli.main", "usage", "tail", "--folder", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == f"t5-serve: {tmp_path}/tail.checkpoint: Is a directory\n"


def test_a_reader_that_has_gone_ends_it(tmp_path: Path) -> None:
    segment(tmp_path, "1", "x" * 200_000 + "\n")
    process = tail(tmp_path, "--follow")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 1
    # Not passed on: the next one gets it.
    assert len(passed(tmp_path)) == 200_001


def test_the_tail_needs_neither_ray_nor_a_database(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['t5-serve', 'usage', 'tail', '--folder', sys.argv[1]];"
        "from serve_app.cli.main import _run; assert _run() == 0;"
        "heavy = {'ray', 'torch', 'duckdb', 'sqlglot', 'pydantic', 'fastapi'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
