"""Work that nobody waits for any more, or that others would wait for, at the Api."""

from __future__ import annotations

import threading
import time

import pytest

from serve_app.api.requests import decide
from serve_app.api.schemas import SummarizeOptions
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.tokenizer import Tokenizer
from serve_app.errors import DeadlineError
from tests.texts import long_text, texts
from tests.unit.conftest import Clients
from tests.unit.local import Local, local_app

pytestmark = pytest.mark.anyio


async def late(app: Local, text: str) -> None:
    """Plan a text in time, and begin it too late."""
    service = app.service
    options = SummarizeOptions(timeout_s=60)
    work = await service.plan(decide(text, options, service.defaults, service.limits))
    work.deadline._at = time.monotonic()
    with pytest.raises(DeadlineError, match="timeout_s: 60"):
        await service.summarize(work)


@pytest.mark.parametrize("text", [texts(1)[0], long_text(400)], ids=["one part", "many parts"])
async def test_no_engine_is_asked_for_what_is_late(
    checkpoint: Checkpoint, clients: Clients, text: str
) -> None:
    async with local_app(checkpoint, clients(), max_input_tokens=96) as app:
        await late(app, text)
        assert app.backend.calls == []


def test_others_go_on_while_a_long_text_is_tokenized(checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer(checkpoint)
    text = long_text(60_000)
    turns = 0
    with_lock = threading.Thread(target=tokenizer.encode, args=[text])
    with_lock.start()
    while with_lock.is_alive():
        time.sleep(0.001)
        turns += 1
    # One or two, if Python's lock were kept until the end.
    assert turns >= 10


def test_long_texts_have_the_tokens_of_short_ones(checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer(checkpoint)
    short, long = "A program. " * 100, "A program. " * 1_000
    ids = tokenizer.encode(short).ids
    assert tokenizer.encode(long).ids == ids * 10
    assert tokenizer.model_input(long, 20)[0] == tokenizer.model_input(short, 20)[0]
