"""The CUDA kernels of decode steps: alone against torch, and in the engine against `generate()`."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from serve_app.engine.checkpoint import Checkpoint, resolve
from serve_app.engine.gpu import attention
from serve_app.engine.gpu.attention import StepAttention
from serve_app.engine.protocol import GenerationSettings
from serve_app.engine.weights import read_shape
from tests.unit import emulated_kernels
from tests.unit.generated import Reference
from tests.unit.torch_engines import Engine, outputs, running

pytestmark = pytest.mark.anyio

WHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here"
))]  # fmt: skip
KINDS = [(16, torch.float32), (64, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16)]
HEADS, SLOTS, ROOM, STATE = 2, 3, 150, 700
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # values are below one


def shape(head_width: int) -> Any:
    return read_shape(
        {"vocab_size": 97, "d_model": 64, "d_kv": head_width, "num_heads": HEADS, "num_layers": 1}
        | {"model_type": "t5"}
    )


@cache
def on_gpu(head_width: int, dtype: torch.dtype) -> StepAttention:
    found = attention.load(shape(head_width), dtype)
    assert found is not None
    return found


def kernels(where: str, folder: Path, head_width: int, dtype: torch.dtype) -> StepAttention:
    if where == "cpu":
        return emulated_kernels.build(folder, head_width, dtype)
    return on_gpu(head_width, dtype)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def counts(numbers: list[int], where: str) -> Tensor:
    """As they lie in a `State`: far apart."""
    state = torch.zeros(SLOTS, STATE, dtype=torch.int64, device=where)
    state[:, 0] = torch.tensor(numbers)
    return state[:, 0]


def attended(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | float) -> Tensor:
    scores = keys.double() @ query.double() + bias
    return torch.softmax(scores, 0) @ values.double()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("width", "dtype"), KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_cross_attention(
    compiled: Path, where: str, width: int, dtype: torch.dtype, beams: int
) -> None:
    torch.manual_seed(1)
    lengths = [0, 37, ROOM]
    query = torch.rand(SLOTS * beams, HEADS * width).sub(0.5).to(where, dtype)
    keys, values = torch.rand(2, SLOTS, HEADS, ROOM, width).sub(0.5).to(where, dtype)
    sources = counts(lengths, where)
    found = kernels(where, compiled, width, dtype).cross(query, keys, values, sources, beams)
    for row, asked in enumerate(query.view(-1, HEADS, width)):
        slot = row // beams
        length = lengths[slot]
        for head in range(HEADS):
            told = found[row, head * width : (head + 1) * width].double()
            kept = keys[slot, head, :length], values[slot, head, :length]
            wanted = attended(asked[head], *kept, 0.0) if length else torch.zeros_like(told)
            assert (told - wanted).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("width", "dtype"), KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_attention_to_what_has_been_generated(
    compiled: Path, where: str, width: int, dtype: torch.dtype, beams: int
) -> None:
    torch.manual_seed(2)
    newest = [0, 36, ROOM - 1]
    joined = torch.rand(SLOTS * beams, 3 * HEADS * width).sub(0.5).to(where, dtype)
    keys, values = torch.rand(2, SLOTS, HEADS, ROOM, beams, width).sub(0.5).to(where, dtype)
    distances = torch.randn(HEADS, 200).to(where, dtype)
    steps = counts(newest, where)
    state = torch.full((SLOTS, STATE), 10**9, device=where)  # of later positions nothing is read
    ancestry = state[:, : beams * ROOM].view(SLOTS, beams, ROOM)
    for slot, step in enumerate(newest):
        ancestry[slot, :, :step] = torch.randint(beams, (beams, step)).to(where)
    # As a step does it: stored first, then seen like all others.
    kept = [tensor.clone() for tensor in (keys, values)]
    asked, *new = joined.view(SLOTS, beams, 3, HEADS, width).permute(2, 0, 3, 1, 4)
    for slot, step in enumerate(newest):
        for tensor, one in zip(kept, new, strict=True):
            tensor[slot, :, step] = one[slot]
    run = kernels(where, compiled, width, dtype)
    found = run.generated(joined, keys, values, steps, ancestry, distances)
    assert torch.equal(keys, kept[0])
    assert torch.equal(values, kept[1])
    for slot, step in enumerate(newest):
        back = step - torch.arange(step + 1, device=where)
        for beam in range(beams):
            lanes = [*ancestry[slot, beam, :step].tolist(), beam]
            for head in range(HEADS):
                seen = [tensor[slot, head, range(step + 1), lanes] for tensor in kept]
                bias = distances[head, back].double()
                wanted = attended(asked[slot, head, beam], *seen, bias)
                told = found[slot * beams + beam, head * width : (head + 1) * width].double()
                assert (told - wanted).abs().max() < TOLERANCE[dtype]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("tiny")
    config: dict[str, Any] = {
        "vocab_size": 97, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": HEADS,
        "num_layers": 2, "decoder_start_token_id": 0, "initializer_factor": 3.0,
    }  # fmt: skip
    T5ForConditionalGeneration(T5Config(**config)).save_pretrained(path)
    return resolve(str(path))


@pytest.mark.parametrize("beams", [1, 3])
async def test_the_engine_says_what_generate_says(
    tiny: Checkpoint, compiled: Path, beams: int
) -> None:
    """Fewer rows than documents: some start when others end, in slots that those have left."""
    run = emulated_kernels.build(compiled, 16, torch.float32)

    class Emulated(Engine):
        def _make_runner(self, checkpoint: Any, plan: Any) -> Any:
            runner = super()._make_runner(checkpoint, plan)
            runner._attention = run
            return runner

    torch.manual_seed(3)
    inputs = [[*torch.randint(3, 97, (n,)).tolist(), 1] for n in (1, 5, 40, 150, 17, 80)]
    asked = [
        GenerationSettings(num_beams=beams, max_new_tokens=n, no_repeat_ngram_size=2)
        for n in (6, 12, 9, 14, 3, 12)
    ]
    options = {"device": "cpu", "dtype": "float32", "max_batch_size": 3 * beams}
    async with running(tiny, Emulated, **options) as (client, _):
        found = await outputs(client, inputs, asked)
    reference = Reference(tiny, "cpu", torch.float32)
    expected = [reference.generate([ids], one)[0] for ids, one in zip(inputs, asked, strict=True)]
    assert reference.differing(inputs, found, expected, asked) == []


@pytest.mark.parametrize(
    ("width", "dtype", "there"),
    [
        (64, torch.bfloat16, True), (64, torch.float32, True), (16, torch.bfloat16, True),
        (128, torch.float32, True), (4, torch.bfloat16, False), (96, torch.bfloat16, False),
        (256, torch.float32, False), (64, torch.float16, False),
    ],
)  # fmt: skip
def test_heads_that_the_kernels_are_for(width: int, dtype: torch.dtype, there: bool) -> None:
    assert attention.fits(shape(width), dtype) is there


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(name: str, *_: Any) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", refuse)
        patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        yield


@pytest.mark.usefixtures("no_library")
def test_without_a_compiler_it_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert attention.load(shape(64), torch.bfloat16) is None
    assert "attention kernels cannot be had" in caplog.text
