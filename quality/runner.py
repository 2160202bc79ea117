"""Summarize texts with every engine: the part of the gate that runs inside the image.

Needs `serve_app` only, and nothing of this package: the gate passes its source to the image's
Python. Texts come on standard input, one JSON object with `id` and `text` a line. On standard
output go a line about the model, then for each run its type of numbers and its summaries:

    {"model": NAME, "weights": SHA256, "parameters": COUNT, "device": …, "versions": {…}}
    {"run": "served", "dtype": "float32"}
    {"run": "served", "search": "greedy", "id": ID, "tokens": [ID…], "text": …, "ended": true}

`ended`: the model ended the text itself, it was not cut off. In place of the last three stands
`error` if there is no summary. Exit status 2 and one line if the model cannot be had.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from serve_app.config import EngineSettings, ModelSettings
from serve_app.engine.build import build_engine
from serve_app.engine.checkpoint import DEMO_NAME, Checkpoint, CheckpointError, resolve
from serve_app.engine.client import EngineClient
from serve_app.engine.protocol import Emit, Engine, EngineRequest, Finished, FinishReason
from serve_app.engine.tokenizer import Tokenizer

# Where the Dockerfile puts a hub model; without one the image serves the demo model.
IN_IMAGE = "/opt/t5-serve/model"
SEARCHES = {"greedy": 1, "beams": 4}


def say(**fields: Any) -> None:
    """Print one line."""
    print(json.dumps(fields), flush=True)


def weights(checkpoint: Checkpoint) -> str:
    """SHA-256 over the weights, in hex; its beginning is the `revision` of a folder."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.path.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


async def summarize(
    run: str, checkpoint: Checkpoint, texts: list[dict[str, str]], kind: str, dtype: str
) -> None:
    """Print one engine's summaries of all texts, which it is given at once, as clients would."""
    tokenizer = Tokenizer(checkpoint)

    def make(emit: Emit) -> Engine:
        return build_engine(
            checkpoint,
            emit,
            model=ModelSettings(dtype=dtype),
            engine=EngineSettings(
                kind=kind, max_waiting_requests=len(texts), max_waiting_tokens=1 << 24
            ),
            cpus=len(os.sched_getaffinity(0)),
        )

    client = EngineClient(make)
    # What `auto` has become; the protocol has no word for it.
    say(run=run, dtype=vars(client)["_engine"]._dtype)

    async def one(search: str, beams: int, row: dict[str, str]) -> None:
        ids, _ = tokenizer.model_input(checkpoint.prefix + row["text"], checkpoint.max_input_tokens)
        settings = replace(checkpoint.defaults, num_beams=beams)
        about = {"run": run, "search": search, "id": row["id"]}
        outcome = await client.run(EngineRequest(f"{search} {row['id']}", ids, settings))
        if isinstance(outcome, Finished):
            tokens = list(outcome.ids)
            ended = outcome.reason is FinishReason.STOP
            say(**about, tokens=tokens, text=tokenizer.decode(tokens), ended=ended)
        else:
            say(**about, error=outcome.message)

    try:
        for search, beams in SEARCHES.items():
            await asyncio.gather(*(one(search, beams, row) for row in texts))
    finally:
        await asyncio.to_thread(client.close)


def main() -> None:
    """Read texts, print summaries."""
    parser = argparse.ArgumentParser(prog="runner")
    parser.add_argument("--model", default=IN_IMAGE if Path(IN_IMAGE).is_dir() else DEMO_NAME)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    texts = [json.loads(line) for line in sys.stdin]
    try:
        checkpoint = resolve(arguments.model)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    say(
        model=checkpoint.name,
        weights=weights(checkpoint),
        parameters=checkpoint.parameters,
        device="cuda" if torch.cuda.is_available() else "cpu",
        versions={name: version(name) for name in ("t5-serve", "torch", "transformers")},
    )
    for run, kind, dtype in (
        ("served", "continuous", arguments.dtype),
        ("float32", "continuous", "float32"),
        ("reference", "transformers", "float32"),
    ):
        asyncio.run(summarize(run, checkpoint, texts, kind, dtype))


if __name__ == "__main__":
    main()
