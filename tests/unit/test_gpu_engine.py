"""The torch runner as a GPU runs it: against `generate()`, with CUDA graphs, out of memory, lost.

Where there is no GPU, what needs none runs on the CPU, in the views that graphs would capture.
`python -m pytest tests/unit/test_gpu_engine.py` needs of the dependencies only torch, transformers,
safetensors and pytest with its plugins for anyio and timeouts.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from serve_app.engine.checkpoint import Checkpoint, resolve
from serve_app.engine.gpu.graphs import StepGraphs, forward
from serve_app.engine.gpu.runner import TorchRunner
from serve_app.engine.protocol import BatchRan, EngineRequest, Failed, GenerationSettings
from serve_app.engine.queue import Entry
from serve_app.engine.runner import Plan
from tests.texts import texts
from tests.unit import recorded_graphs
from tests.unit.generated import Reference
from tests.unit.torch_engines import Eager, Engine, Recorded, outputs, outputs_at_once, running

pytestmark = pytest.mark.anyio

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
VOCABULARY = 997
SEARCHES = {
    "greedy": GenerationSettings(max_new_tokens=40, no_repeat_ngram_size=3),
    "greedy-bounds": GenerationSettings(
        min_new_tokens=25, max_new_tokens=30, repetition_penalty=1.3
    ),
    "beams": GenerationSettings(
        num_beams=4, min_new_tokens=8, max_new_tokens=40, no_repeat_ngram_size=3,
        length_penalty=2.0, early_stopping=True,
    ),
    "beams-open": GenerationSettings(num_beams=3, max_new_tokens=24, length_penalty=0.6),
}  # fmt: skip
GREEDY = GenerationSettings(min_new_tokens=12, max_new_tokens=12)
BEAMS = GenerationSettings(num_beams=4, min_new_tokens=12, max_new_tokens=12)


@torch.inference_mode()
def logits(
    checkpoint: Checkpoint,
    inputs: Sequence[list[int]],
    told: Sequence[list[int]],
    *,
    graphs: bool = False,
    kernels: bool = True,
    **options: Any,
) -> list[Tensor]:
    """Logits of a runner that is told what to choose, for each input (tokens, vocabulary)."""
    steps = max(map(len, told))
    plan = Plan(rows=len(inputs), steps=steps, source=512, rounded=True, **options)
    runner = TorchRunner(checkpoint, plan)
    if not kernels:
        runner._attention = None
    settings = GenerationSettings(max_new_tokens=steps)
    entries = [Entry(EngineRequest(f"{i}", ids, settings), 0.0) for i, ids in enumerate(inputs)]
    runner.admit(entries)
    [group] = runner._groups.values()
    slots = [entries.index(entry) for entry in group.entries]
    run: Any = partial(forward, runner._model)
    run = StepGraphs(run) if graphs else run
    made = []
    for step in range(steps):
        made.append(run(group, group.view())[: len(inputs)].to("cpu", copy=True))
        chosen = [told[slot][step] if step < len(told[slot]) else 0 for slot in slots]
        group.state.tokens[: len(slots), 0, step + 1] = torch.tensor(chosen)
        group.end()
        group.launched()
    by_slot = torch.stack(made, 1)
    return [by_slot[slots.index(i)][: len(one)] for i, one in enumerate(told)]


def random_inputs(count: int, longest: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [*rng.choices(range(3, VOCABULARY), k=rng.randint(1, longest - 1)), 1] for _ in range(count)
    ]


def mixed_load() -> tuple[list[list[int]], list[GenerationSettings]]:
    """Inputs and settings of documents of all lengths and searches."""
    rng = random.Random(5)
    inputs = random_inputs(48, 400, 2)
    return inputs, [
        replace(rng.choice(list(SEARCHES.values())), max_new_tokens=rng.choice([26, 45, 90]))
        for _ in inputs
    ]


def random_model(path: Path, factor: float) -> Checkpoint:
    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4,
        "num_layers": 2, "decoder_start_token_id": 0, "initializer_factor": factor,
    }  # fmt: skip
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(path)
    return resolve(str(path))


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random model whose logits lie far apart: rounding must not decide between tokens."""
    return random_model(tmp_path_factory.mktemp("spread"), 3.0)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random model as they are initialized; the other multiplies what rounding does."""
    return random_model(tmp_path_factory.mktemp("calm"), 1.0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random model of T5-small's shape."""
    from bench.engine import models

    return resolve(str(models.build("small", tmp_path_factory.mktemp("small"), 3)))


@pytest.fixture(scope="module")
def summaries(checkpoint: Checkpoint) -> list[list[int]]:
    """The demo model's inputs for real texts."""
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.path))
    return [tokenizer("summarize: " + text).input_ids for text in texts(16)]


# What it says


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("search", SEARCHES)
async def test_float32_says_what_generate_says(
    checkpoint: Checkpoint,
    spread: Checkpoint,
    summaries: list[list[int]],
    device: str,
    search: str,
) -> None:
    settings = SEARCHES[search]
    for model, inputs in ((spread, random_inputs(16, 300, 1)), (checkpoint, summaries)):
        reference = Reference(model, device, torch.float32)
        expected = reference.generate(inputs, settings)
        # Fewer rows than documents: some start when others end.
        options = {"device": device, "dtype": "float32", "max_batch_size": 24}
        async with running(model, **options) as (client, _):
            asked = [settings] * len(inputs)
            found = await outputs(client, inputs, asked)
        assert reference.differing(inputs, found, expected, asked) == []


@pytest.mark.parametrize("where", ["cpu", "cpu-recorded", pytest.param("cuda", marks=needs_gpu)])
async def test_slots_are_used_again_while_others_go_on(
    spread: Checkpoint, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and beam search side by side, of all lengths, each in its own time, some cancelled."""
    device, _, recorded = where.partition("-")
    if recorded:
        recorded_graphs.install(monkeypatch)
    inputs, asked = mixed_load()
    reference = Reference(spread, device, torch.float32)
    expected: dict[int, list[int]] = {}
    for settings in set(asked):
        mine = [i for i, one in enumerate(asked) if one == settings]
        told = reference.generate([inputs[i] for i in mine], settings)
        expected.update(zip(mine, told, strict=True))
    options = {"device": device, "dtype": "float32", "max_batch_size": 10}
    async with running(spread, Recorded if recorded else Engine, **options) as (client, _):

        async def leave_early(index: int) -> None:
            request = EngineRequest(f"gone{index}", inputs[index], GREEDY, stream=True)
            events = client.events(replace(request, settings=SEARCHES["greedy-bounds"]))
            await anext(events)
            await events.aclose()

        found, *_ = await asyncio.gather(
            outputs(client, inputs, asked), *(leave_early(i) for i in range(6))
        )
    told = [expected[i] for i in range(len(inputs))]
    assert reference.differing(inputs, found, told, asked) == []


def test_beams_that_tie_are_told_from_faults(spread: Checkpoint) -> None:
    """Of this document the fourth and the fifth best beam are 0.0005 apart at token 32, of sums
    that float32 has to within 0.002. Which one it keeps decides the output's whole second half, and
    float64 keeps the other.
    """
    inputs, asked = mixed_load()
    source, settings = inputs[30], asked[30]
    [exact] = Reference(spread, "cpu", torch.float64).generate([source], settings)
    reference = Reference(spread, "cpu", torch.float32)
    expected = reference.generate([source], settings)
    assert reference.differing([source], [exact], expected, [settings]) == []
    fault = [*exact[:-1], exact[-1] + 1]
    assert reference.differing([source], [fault], expected, [settings]) == [0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["calm", "demo"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    checkpoint: Checkpoint,
    calm: Checkpoint,
    summaries: list[list[int]],
    device: str,
    model: str,
) -> None:
    """Both round to 8 bits after each operation and differ in their order: a fifth more error is
    chance, a mask or a position that is wrong is several times as much."""
    chosen, inputs = {
        "calm": (calm, random_inputs(12, 200, 3)), "demo": (checkpoint, summaries[:12]),
    }[model]  # fmt: skip
    exact = Reference(chosen, device, torch.float32)
    told = [[*ids, 1] for ids in exact.generate(inputs, SEARCHES["greedy"])]
    truth = torch.cat([exact.logits(*pair) for pair in zip(inputs, told, strict=True)])
    rounded = Reference(chosen, device, torch.bfloat16)
    theirs = torch.cat([rounded.logits(*pair) for pair in zip(inputs, told, strict=True)])
    ours = torch.cat(logits(chosen, inputs, told, device=device, dtype="bfloat16"))
    errors = [float((one - truth).norm() / truth.norm()) for one in (ours, theirs)]
    assert 0 < errors[0] < 1.2 * errors[1]
    same = torch.cat(logits(chosen, inputs, told, device=device, dtype="float32"))
    assert float((same - truth).norm() / truth.norm()) < errors[1] / 50


# CUDA graphs


def test_what_a_capture_refuses_a_recording_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_graphs.install(monkeypatch)
    values = torch.ones(3)
    waits: list[Callable[[], Any]] = [
        lambda: values[0].item(), lambda: values[values > 0], lambda: values + torch.tensor([1.0]),
    ]  # fmt: skip
    for wait in waits:
        with (
            torch.inference_mode(),
            pytest.raises(RuntimeError, match="capturing"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            wait()


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_graphs_say_what_single_launches_say(
    calm: Checkpoint, spread: Checkpoint, dtype: str
) -> None:
    inputs = random_inputs(24, 400, 4)
    told = [ids[:30] for ids in random_inputs(24, 80, 5)]
    replayed = torch.cat(logits(calm, inputs, told, graphs=True, device="cuda", dtype=dtype))
    launched = torch.cat(logits(calm, inputs, told, device="cuda", dtype=dtype))
    # The same kernels, unless libraries choose others on another stream: then they round otherwise.
    error = float((replayed - launched).norm() / launched.norm())
    assert error < {"float32": 1e-5, "bfloat16": 5e-3}[dtype]
    asked = [random.Random(i).choice(list(SEARCHES.values())) for i in range(len(inputs))]
    found = []
    for kind in (Engine, Eager):
        options = {"device": "cuda", "dtype": dtype, "max_batch_size": 12}
        async with running(spread, kind, **options) as (client, _):
            found.append(await outputs(client, inputs, asked))
    if dtype == "float32":  # otherwise who shares an encoder's batch decides how it rounds
        assert found[0] == found[1]


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_kernels_say_what_torch_says(calm: Checkpoint, dtype: str) -> None:
    """In bfloat16 torch rounds scores and weights, and the kernels do not."""
    inputs = random_inputs(24, 400, 4)
    told = [ids[:30] for ids in random_inputs(24, 80, 5)]
    options = {"device": "cuda", "dtype": dtype}
    kernels, torchs = (
        torch.cat(logits(calm, inputs, told, kernels=one, **options)) for one in (True, False)
    )
    error = float((kernels - torchs).norm() / torchs.norm())
    assert error < {"float32": 1e-5, "bfloat16": 2e-2}[dtype]


# Memory


@contextmanager
def memory_left(size: int) -> Iterator[None]:
    """This process may take so many bytes of the device more than it holds now.

    What it holds is put to use first: torch gives back no block of memory of which a part is taken.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(held / total)
    hogs = []
    for part in (64 << 20, 8 << 20, 2 << 20):
        with suppress(torch.OutOfMemoryError):
            while True:
                hogs.append(torch.empty(part, dtype=torch.uint8, device="cuda"))
    torch.cuda.set_per_process_memory_fraction((held + size) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        del hogs


@torch.inference_mode()
def encoding_takes(runner: TorchRunner, inputs: Sequence[list[int]]) -> int:
    """Bytes of the device at its peak, beside what is there already."""
    entries = [Entry(EngineRequest(f"{i}", ids, GREEDY), 0.0) for i, ids in enumerate(inputs)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner._encode(entries)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def preempted(seen: Sequence[Any]) -> int:
    return sum(one.preempted for one in seen if isinstance(one, BatchRan))


@needs_gpu
async def test_out_of_memory_in_a_step_some_start_again(small: Checkpoint) -> None:
    inputs = [ids[:8] for ids in random_inputs(128, 64, 6)]
    asked = [BEAMS] * len(inputs)
    options = {"device": "cuda", "dtype": "float32", "max_batch_size": 4 * len(inputs)}
    async with running(small, **options) as (client, seen):
        expected = await outputs(client, inputs, asked)
        client._engine._runner._graphs._graphs.clear()  # type: ignore[attr-defined]
        # Logits of 512 rows are 66 MB, and search has them three times.
        with memory_left(100 << 20):
            assert await outputs(client, inputs, asked) == expected
        assert preempted(seen) > 0
        assert await outputs(client, inputs, asked) == expected


@needs_gpu
async def test_out_of_memory_in_encoding_fewer_are_encoded(
    small: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """The sixteen get half of what encoding them together takes, and one is known to need less."""
    rng = random.Random(7)
    inputs = [[*rng.choices(range(3, 32_000), k=511), 1] for _ in range(16)]
    asked = [GREEDY] * len(inputs)
    options = {
        "device": "cuda", "dtype": "float32", "max_batch_size": 16, "max_batch_tokens": 16 * 512,
    }  # fmt: skip
    async with running(small, **options) as (client, seen):
        expected = await outputs_at_once(client, inputs, asked)
        assert "failed together" not in caplog.text
        runner = client._engine._runner  # type: ignore[attr-defined]
        room = encoding_takes(runner, inputs) // 2
        # torch takes memory in pieces of 2 and 20 MiB.
        assert 2 * encoding_takes(runner, inputs[:1]) + (64 << 20) < room
        with memory_left(room):
            assert await outputs_at_once(client, inputs, asked) == expected
        assert "16 requests failed together" in caplog.text
        assert [one for one in seen if isinstance(one, Failed)] == []


@needs_gpu
async def test_a_search_without_documents_makes_way_for_another(small: Checkpoint) -> None:
    """Each number of beams has caches of its own, for as many rows as the batch may have."""
    inputs = random_inputs(12, 100, 8)
    searches = [GREEDY, BEAMS, replace(BEAMS, num_beams=2)]
    asked = [searches[i % 3] for i in range(len(inputs))]
    options = {"device": "cuda", "dtype": "float32", "max_batch_size": 128}
    async with running(small, **options) as (client, _):
        expected = await outputs(client, inputs, asked)
    async with running(small, **options) as (client, _):
        one = await outputs(client, inputs[:1], asked[:1])
        # Greedy search took 2 GB, the others want 0.8 and 1.2.
        with memory_left(500 << 20):
            assert [*one, *await outputs(client, inputs[1:], asked[1:])] == expected


@needs_gpu
@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
async def test_planned_rows_fit(small: Checkpoint, settings: GenerationSettings) -> None:
    """With a card of 2 GiB: as many documents as the plan has rows for, and as long as may be."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    rng = random.Random(9)
    most = small.defaults.max_new_tokens
    asked = replace(settings, min_new_tokens=most, max_new_tokens=most)
    hog = torch.empty(free - (2 << 30), dtype=torch.uint8, device="cuda")
    try:
        async with running(small, device="cuda", dtype="bfloat16") as (client, seen):
            documents = client.load().slots // asked.num_beams
            assert 32 <= client.load().slots < 256
            inputs = [[*rng.choices(range(3, 32_000), k=511), 1] for _ in range(documents)]
            await outputs(client, inputs, [asked] * documents)
            assert preempted(seen) == 0
            assert max(one.requests for one in seen if isinstance(one, BatchRan)) == documents
    finally:
        del hog
        torch.cuda.empty_cache()


# A device that is lost

_POISON = """
import asyncio, json, sys
from serve_app.engine.checkpoint import resolve
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.protocol import EngineRequest, EngineStoppedError, GenerationSettings, Stopped

async def main():
    seen = []
    client = EngineClient(
        lambda emit: ContinuousEngine(resolve("demo"), emit, device="cuda", dtype="float32"),
        seen.append,
    )
    asked = GenerationSettings(max_new_tokens=8)
    fine = await client.run(EngineRequest("fine", [5, 6, 1], asked))
    # A token far outside of the vocabulary: the embedding's kernel asserts.
    ends = await client.run(EngineRequest("poison", [10**9, 1], asked))
    try:
        await client.run(EngineRequest("later", [5, 6, 1], asked))
    except EngineStoppedError as error:
        later = str(error)
    stopped = [one.message for one in seen if isinstance(one, Stopped)]
    print(json.dumps([type(fine).__name__, ends.reason, ends.message, later, stopped]))
    sys.stdout.flush()

asyncio.run(main())
"""


@needs_gpu
def test_a_device_that_is_lost_ends_the_engine() -> None:
    child = subprocess.run(
        [sys.executable, "-c", _POISON], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert child.stdout, child.stderr[-2_000:]
    fine, reason, message, later, stopped = json.loads(child.stdout.splitlines()[-1])
    assert (fine, reason) == ("Finished", "stopped")
    assert "device-side assert" in message
    assert [message, later] == stopped * 2
