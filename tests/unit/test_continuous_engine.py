"""The continuous engine equals `generate()`, token for token, whatever shares its batch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from serve_app.engine.checkpoint import Checkpoint, resolve
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.protocol import (
    BatchRan,
    EngineRequest,
    Finished,
    FinishReason,
    GenerationSettings,
)
from tests.texts import texts
from tests.unit.conftest import Direct
from tests.unit.test_reference_engine import until

pytestmark = pytest.mark.anyio

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "initializer_factor": 3.0,  # spreads the logits: chance must not decide between tokens
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "t5-v1.0": lambda: T5ForConditionalGeneration(T5Config(**SMALL)),
    "t5-v1.1": lambda: T5ForConditionalGeneration(
        T5Config(**SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**SMALL, feed_forward_proj="gated-gelu")),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small random model, whose end token is likely enough to come."""
    torch.manual_seed(7)
    model = FAMILIES[request.param]()
    head = model.lm_head.weight if not model.config.tie_word_embeddings else model.shared.weight
    with torch.no_grad():
        head[1] += 0.15 * head.std() * torch.randn(head.shape[1]).sign()
    path: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


@asynccontextmanager
async def running(
    checkpoint: Checkpoint, batches: list[BatchRan] | None = None, **options: Any
) -> AsyncIterator[EngineClient]:
    client = EngineClient(
        lambda emit: ContinuousEngine(checkpoint, emit, threads=1, **options),
        None if batches is None else batches.append,
    )
    try:
        yield client
    finally:
        await asyncio.to_thread(client.close)


def expected(model: Any, ids: list[int], settings: GenerationSettings) -> list[int]:
    """What `generate()` gives for one input alone."""
    said = asdict(settings)
    if settings.num_beams == 1:
        del said["length_penalty"], said["early_stopping"]
    with torch.inference_mode():
        out = model.generate(input_ids=torch.tensor([ids]), do_sample=False, **said)[0].tolist()[1:]
    return out[: out.index(1)] if 1 in out else out


def random_settings(rng: random.Random) -> GenerationSettings:
    most = rng.randint(1, 24)
    return GenerationSettings(
        num_beams=rng.choice([1, 1, 1, 2, 3, 4, 8]),
        min_new_tokens=rng.choice([0, 0, rng.randint(0, most)]),
        max_new_tokens=most,
        length_penalty=rng.choice([1.0, 2.0, 0.0, -0.5, 0.6]),
        no_repeat_ngram_size=rng.choice([0, 1, 2, 3]),
        early_stopping=rng.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(6))
async def test_random_mixes_equal_generate(family: Path, seed: int) -> None:
    rng = random.Random(seed)
    model = T5ForConditionalGeneration.from_pretrained(family).eval()
    if "mt5" in str(family):
        model = MT5ForConditionalGeneration.from_pretrained(family).eval()
    work = [
        (
            [
                *rng.choices(
                    range(3, VOCABULARY), k=rng.choice([rng.randint(1, 40), rng.randint(1, 300)])
                ),
                1,
            ],
            random_settings(rng),
        )
        for _ in range(24)
    ]
    async with running(resolve(str(family)), max_batch_size=9, max_batch_tokens=256) as client:

        async def late(index: int, delay: float) -> Finished:
            await asyncio.sleep(delay)
            ids, settings = work[index]
            outcome = await client.run(
                EngineRequest(f"r{index}", ids, settings, share=f"{index % 3}")
            )
            assert isinstance(outcome, Finished)
            return outcome

        outcomes = await asyncio.gather(
            *(late(i, rng.choice([0, 0, rng.random() * 0.3])) for i in range(len(work)))
        )
    for (ids, settings), outcome in zip(work, outcomes, strict=True):
        assert list(outcome.ids) == expected(model, ids, settings), settings
        if outcome.reason is FinishReason.MAX_NEW_TOKENS:
            assert len(outcome.ids) == settings.max_new_tokens


@pytest.mark.parametrize(
    "settings",
    [
        GenerationSettings(max_new_tokens=40, no_repeat_ngram_size=3, min_new_tokens=3),
        GenerationSettings(
            num_beams=4, max_new_tokens=30, no_repeat_ngram_size=3, length_penalty=2.0,
            early_stopping=True, min_new_tokens=10,
        ),
    ],
    ids=["greedy", "beams"],
)  # fmt: skip
async def test_the_demo_model_equals_generate(
    checkpoint: Checkpoint, direct: Direct, settings: GenerationSettings
) -> None:
    inputs = [direct.ids(text) for text in texts(40)]
    batches: list[BatchRan] = []
    async with running(checkpoint, batches) as client:
        outcomes = await asyncio.gather(
            *(client.run(EngineRequest(f"r{i}", ids, settings)) for i, ids in enumerate(inputs))
        )
    for ids, outcome in zip(inputs, outcomes, strict=True):
        assert isinstance(outcome, Finished)
        assert list(outcome.ids) == expected(direct.model, ids, settings)
    assert max(batch.requests for batch in batches) == 32 // settings.num_beams


async def test_nobody_waits_for_a_long_one(checkpoint: Checkpoint, direct: Direct) -> None:
    ids = direct.ids(texts(1)[0])
    endless = GenerationSettings(min_new_tokens=3_000, max_new_tokens=3_000)
    short = GenerationSettings(max_new_tokens=4)
    async with running(checkpoint) as client:
        long = asyncio.create_task(client.run(EngineRequest("long", ids, endless)))
        await until(lambda: client.load().running_requests == 1, "it runs")
        for index in range(5):
            assert isinstance(await client.run(EngineRequest(f"s{index}", ids, short)), Finished)
        assert not long.done()
        assert client.load().running_requests == 1
        long.cancel()


async def test_shares_take_turns(checkpoint: Checkpoint, direct: Direct) -> None:
    ids = direct.ids(texts(1)[0])
    settings = GenerationSettings(min_new_tokens=6, max_new_tokens=6)
    finished: list[str] = []
    async with running(checkpoint, max_batch_size=1) as client:

        async def one(name: str, share: str) -> None:
            await client.run(EngineRequest(name, ids, settings, share=share))
            finished.append(name)

        tasks = [asyncio.create_task(one(f"many{i}", "document")) for i in range(12)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one("single", "somebody")))
        await asyncio.gather(*tasks)
    assert finished.index("single") <= 3
    many = [name for name in finished if name != "single"]
    assert many == sorted(many, key=lambda name: int(name.removeprefix("many")))
