"""The continuous engine equals `generate()`, token for token, whatever shares its batch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from serve_app.engine import native
from serve_app.engine.checkpoint import Checkpoint, resolve
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.cpu.runner import CpuRunner
from serve_app.engine.gpu.runner import TorchRunner
from serve_app.engine.protocol import (
    BatchRan,
    EngineRequest,
    Finished,
    FinishReason,
    GenerationSettings,
)
from serve_app.engine.runner import Plan, Runner
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


# Who holds the running batch. The kernels of other instruction sets than this machine's best are
# run too, as far as it has them. The views of CUDA graphs are what a GPU works in, less the graphs.
RUNNERS = [*native.supported(), "torch", "torch in the views of CUDA graphs"]


class Engine(ContinuousEngine):
    """A continuous engine whose running batch is held by one of `RUNNERS`."""

    def __init__(self, *args: Any, runner: str, **options: Any) -> None:
        self._chosen = runner
        super().__init__(*args, **options)

    def _make_runner(self, checkpoint: Checkpoint, plan: Plan) -> Runner:  # type: ignore[override]
        if self._chosen.startswith("torch"):
            return TorchRunner(checkpoint, replace(plan, rounded=self._chosen != "torch"))
        return CpuRunner(checkpoint, plan, native.open_library(self._chosen))


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small random model, whose end token is likely enough to come."""
    return save(FAMILIES[request.param], tmp_path_factory.mktemp(request.param))


def save(make: Callable[[], Any], path: Path) -> Path:
    torch.manual_seed(7)
    model = make()
    head = model.lm_head.weight if not model.config.tie_word_embeddings else model.shared.weight
    with torch.no_grad():
        head[1] += 0.15 * head.std() * torch.randn(head.shape[1]).sign()
    model.save_pretrained(path)
    return path


@asynccontextmanager
async def running(
    checkpoint: Checkpoint,
    batches: list[BatchRan] | None = None,
    runner: str = RUNNERS[0],
    **options: Any,
) -> AsyncIterator[EngineClient]:
    client = EngineClient(
        lambda emit: Engine(checkpoint, emit, threads=1, runner=runner, **options),
        lambda event: (
            batches.append(event) if batches is not None and isinstance(event, BatchRan) else None
        ),
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


@st.composite
def all_settings(draw: st.DrawFn) -> GenerationSettings:
    most = draw(st.integers(1, 24))
    return GenerationSettings(
        num_beams=draw(st.sampled_from([1, 1, 1, 2, 3, 4, 8])),
        min_new_tokens=draw(st.one_of(st.just(0), st.integers(0, most))),
        max_new_tokens=most,
        length_penalty=draw(st.sampled_from([1.0, 2.0, 0.0, -0.5, 0.6])),
        no_repeat_ngram_size=draw(st.integers(0, 3)),
        early_stopping=draw(st.booleans()),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
    )


TOKENS = st.integers(3, VOCABULARY - 1)
INPUTS = st.one_of(
    st.lists(TOKENS, min_size=1, max_size=40), st.lists(TOKENS, min_size=41, max_size=300)
).map(lambda ids: [*ids, 1])


@dataclass
class Arrival:
    ids: list[int]
    settings: GenerationSettings
    delay: float
    share: str


ARRIVALS = st.builds(
    Arrival,
    ids=INPUTS,
    settings=all_settings(),
    delay=st.one_of(st.just(0.0), st.floats(0, 0.2)),
    share=st.sampled_from("abc"),
)


@pytest.mark.parametrize("runner", RUNNERS)
def test_random_mixes_equal_generate(family: Path, runner: str) -> None:
    """Any requests with any settings, arriving at any time, more than there are rows for."""
    kind = MT5ForConditionalGeneration if "mt5" in str(family) else T5ForConditionalGeneration
    model = kind.from_pretrained(family).eval()

    @settings(
        max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(ARRIVALS, min_size=12, max_size=24))
    def mix(arrivals: list[Arrival]) -> None:
        for arrival, outcome in zip(arrivals, asyncio.run(served(arrivals)), strict=True):
            told = expected(model, arrival.ids, arrival.settings)
            assert list(outcome.ids) == told, arrival.settings
            if outcome.reason is FinishReason.MAX_NEW_TOKENS:
                assert len(outcome.ids) == arrival.settings.max_new_tokens

    async def served(arrivals: list[Arrival]) -> list[Finished]:
        async with running(
            resolve(str(family)), runner=runner, max_batch_size=9, max_batch_tokens=256
        ) as client:

            async def one(index: int, arrival: Arrival) -> Finished:
                await asyncio.sleep(arrival.delay)
                outcome = await client.run(
                    EngineRequest(f"{index}", arrival.ids, arrival.settings, share=arrival.share)
                )
                assert isinstance(outcome, Finished), outcome
                return outcome

            return await asyncio.gather(*(one(i, a) for i, a in enumerate(arrivals)))

    mix()


@pytest.mark.parametrize("runner", [RUNNERS[0], "torch"])
@pytest.mark.parametrize(
    "said",
    [
        {"suppress_tokens": [5, 9, 11], "begin_suppress_tokens": [4, 1]},
        {"forced_bos_token_id": 6, "begin_suppress_tokens": [7]},
        {"forced_eos_token_id": 1},
    ],
    ids=lambda said: " ".join(said),
)
async def test_tokens_that_the_configuration_suppresses_or_forces(
    tmp_path: Path, said: dict[str, Any], runner: str
) -> None:
    path = save(FAMILIES["t5-v1.0"], tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(path).eval()
    model.generation_config.update(**said)
    model.generation_config.save_pretrained(path)
    rng = random.Random(1)
    work = [
        ([*rng.choices(range(3, VOCABULARY), k=30), 1],
         GenerationSettings(num_beams=beams, max_new_tokens=12, no_repeat_ngram_size=2))
        for beams in (1, 1, 1, 3, 3, 3)
    ]  # fmt: skip
    async with running(resolve(str(path)), runner=runner) as client:
        outcomes = await asyncio.gather(
            *(client.run(EngineRequest(f"{i}", *one)) for i, one in enumerate(work))
        )
    unbound = T5ForConditionalGeneration.from_pretrained(path).eval()
    unbound.generation_config = GenerationConfig(
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1
    )
    told = [expected(model, *one) for one in work]
    assert [list(outcome.ids) for outcome in outcomes] == told
    assert told != [expected(unbound, *one) for one in work]  # it made a difference


@pytest.mark.parametrize(
    "asked",
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
    checkpoint: Checkpoint, direct: Direct, asked: GenerationSettings
) -> None:
    inputs = [direct.ids(text) for text in texts(40)]
    batches: list[BatchRan] = []
    async with running(checkpoint, batches, max_batch_size=32) as client:
        outcomes = await asyncio.gather(
            *(client.run(EngineRequest(f"r{i}", ids, asked)) for i, ids in enumerate(inputs))
        )
    for ids, outcome in zip(inputs, outcomes, strict=True):
        assert isinstance(outcome, Finished)
        assert list(outcome.ids) == expected(direct.model, ids, asked)
    assert max(batch.requests for batch in batches) == 32 // asked.num_beams


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
    six = GenerationSettings(min_new_tokens=6, max_new_tokens=6)
    finished: list[str] = []
    async with running(checkpoint, max_batch_size=1) as client:

        async def one(name: str, share: str) -> None:
            await client.run(EngineRequest(name, ids, six, share=share))
            finished.append(name)

        tasks = [asyncio.create_task(one(f"many{i}", "document")) for i in range(12)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one("single", "somebody")))
        await asyncio.gather(*tasks)
    assert finished.index("single") <= 3
    many = [name for name in finished if name != "single"]
    assert many == sorted(many, key=lambda name: int(name.removeprefix("many")))


async def admitted(
    checkpoint: Checkpoint, lengths: Sequence[int], share: float
) -> tuple[list[int], list[int]]:
    """How many documents each step let in, and the steps: of documents that come together."""
    batches: list[BatchRan] = []
    source = [*range(3, 12), 1]
    requests = [
        EngineRequest(
            f"{i}", source, GenerationSettings(min_new_tokens=length, max_new_tokens=length)
        )
        for i, length in enumerate(lengths)
    ]
    options: dict[str, Any] = {"max_batch_size": 8, "speculation": False}
    async with running(checkpoint, batches, **options) as client:
        engine: Any = client._engine
        engine._runner.admit_share = share
        with engine._lock:  # this thread, on which requests are submitted, may take it again
            tasks = [asyncio.create_task(client.run(request)) for request in requests]
            while len(engine._waiting) < len(requests):  # noqa: ASYNC110
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
    came = [(batch.input_tokens // len(source), step) for step, batch in enumerate(batches)]
    return [count for count, _ in came if count], [step for count, step in came if count]


async def test_documents_are_let_in_together_where_a_few_cost_as_much(
    checkpoint: Checkpoint,
) -> None:
    """Of the first eight one ends in each step, of those that follow the one that came first."""
    lengths = [*range(5, 13), *[20] * 8]
    assert (await admitted(checkpoint, lengths, 0.5))[0] == [8, 4, 4]
    assert (await admitted(checkpoint, lengths, 0.0))[0] == [8, *[1] * 8]


async def test_who_finds_room_for_all_that_wait_is_let_in_at_once(checkpoint: Checkpoint) -> None:
    """Fewer rows are free than are worth it, but nobody else waits."""
    counts, steps = await admitted(checkpoint, [5, *[40] * 7, 5], 0.5)
    assert (counts, steps) == ([8, 1], [0, 5])


async def test_nobody_is_held_back_for_long(checkpoint: Checkpoint) -> None:
    counts, steps = await admitted(checkpoint, [5, *[60] * 7, 5, 5], 0.5)
    # One has ended and two wait: sixteen steps later one of them comes in.
    assert (counts, steps) == ([8, 1, 1], [0, 5 + 16, 5 + 16 + 5])
