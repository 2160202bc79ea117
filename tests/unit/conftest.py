"""An engine of the demo model in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.client import EngineClient
from serve_app.engine.protocol import BatchRan, Emit, Failed, Finished
from serve_app.engine.reference import ReferenceEngine


class Direct:
    """`generate()` itself, one text at a time: what every engine must equal."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.path))
        self.model = T5ForConditionalGeneration.from_pretrained(
            str(checkpoint.path), dtype=torch.float32
        ).eval()

    def ids(self, text: str, max_tokens: int = 512) -> list[int]:
        """Encoder input of a text."""
        return self.tokenizer(
            "summarize: " + text, truncation=True, max_length=max_tokens
        ).input_ids

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], **settings: Any) -> list[int]:
        """Output ids without special tokens."""
        out = self.model.generate(input_ids=torch.tensor([list(ids)]), do_sample=False, **settings)
        return [i for i in out[0].tolist() if i not in (0, 1)]


@pytest.fixture(scope="session")
def direct(checkpoint: Checkpoint) -> Direct:
    return Direct(checkpoint)


class Clients:
    """Makes engine clients and closes them in the end.

    `batches` is what went through each, `ends` how each request ended, waited for or not.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._clients: list[EngineClient] = []
        self.batches: list[BatchRan] = []
        self.ends: list[Finished | Failed] = []

    def __call__(self, **options: Any) -> EngineClient:
        def make(emit: Emit) -> ReferenceEngine:
            return ReferenceEngine(self._checkpoint, emit, threads=1, **options)

        client = EngineClient(make, self._seen)
        self._clients.append(client)
        return client

    def _seen(self, event: BatchRan | Finished | Failed) -> None:
        if isinstance(event, BatchRan):
            self.batches.append(event)
        else:
            self.ends.append(event)

    def close(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture
def clients(checkpoint: Checkpoint) -> Iterator[Clients]:
    made = Clients(checkpoint)
    yield made
    made.close()


MakeClient = Callable[..., EngineClient]
