"""Usage events of a real replica, and the reports on them."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

from ray import serve

from serve_app.usage.folder import segments
from serve_app.usage.reader import Tally, read_files
from serve_app.usage.views import Usage
from tests.integration.conftest import Deploy, until
from tests.texts import texts


def test_a_replica_writes_its_events_and_closes_their_file(deploy: Deploy, tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    service = deploy("usage", "/usage", usage={"folder": str(folder)})
    headers = {"X-Request-Id": "mine"}
    for text in texts(3):
        answer = service.post("/v1/summarize", {"text": text}, headers=headers)
        assert answer.status_code == 200
    # Answered is not yet written: only the writer's end is.
    serve.delete("usage")
    [segment] = segments(folder)
    with segment.open("rb") as file:
        until(lambda: _unlocked(file.fileno()), "the replica closed its file")
    events = [json.loads(line) for line in segment.open()]
    mine = [event for event in events if event["request_id"] == "mine"]
    assert [event["client"] for event in mine] == ["tester"] * 3
    assert len({event["replica"] for event in mine}) == 1
    assert all(event["replica"] and event["compute_ms"] > 0 for event in mine)
    [row] = Usage(read_files([folder], Tally()), client="tester").report("overview").records()
    assert row["calls"] == 3  # three calls with one id are three calls
    assert row["output_tokens"] == sum(event["output_tokens"] for event in mine)


def _unlocked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def test_without_events_there_is_no_folder(deploy: Deploy, tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    service = deploy("silent", "/silent", usage={"enabled": False, "folder": str(folder)})
    assert service.post("/v1/summarize", {"text": texts(1)[0]}).status_code == 200
    serve.delete("silent")
    assert not folder.exists()
