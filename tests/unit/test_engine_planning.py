"""What the engine decides: drafts, memory, precision."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rouge_score import rouge_scorer
from transformers import T5Config, T5ForConditionalGeneration

from serve_app.config import EngineSettings, ModelSettings
from serve_app.engine import build, native
from serve_app.engine.checkpoint import Checkpoint, CheckpointError, resolve
from serve_app.engine.continuous import make_runner
from serve_app.engine.cpu.linear import Precision
from serve_app.engine.cpu.state import State
from serve_app.engine.gpu.memory import LIBRARIES, encoder_bytes, plan_rows, row_bytes
from serve_app.engine.protocol import (
    BatchRan,
    EngineRequest,
    Finished,
    GenerationSettings,
    TokenConstraints,
)
from serve_app.engine.runner import Plan
from serve_app.engine.speculation import Draft, Speculation
from serve_app.engine.weights import read_shape
from tests.texts import texts
from tests.unit.conftest import Direct
from tests.unit.test_continuous_engine import running

pytestmark = pytest.mark.anyio

PLAN = Plan(device="cuda", dtype="bfloat16", rows=0, steps=200, source=512)
T5_SMALL = read_shape(
    {
        "model_type": "t5", "vocab_size": 32_128, "d_model": 512, "d_kv": 64, "d_ff": 2_048,
        "num_heads": 8, "num_layers": 6,
    }
)  # fmt: skip


def learned(fixed_s: float, row_s: float, right: int, wrong: int) -> Speculation:
    """After steps of this cost, and drafts of runs of two that were right or wrong."""
    speculation = Speculation()
    rng = random.Random(0)
    for _ in range(400):
        rows = rng.randint(1, 40)
        speculation.took(rows, fixed_s + row_s * rows)
    for _ in range(40):
        for count, chosen in ((right, 7), (wrong, 8)):
            for _ in range(count):
                speculation.learn(Draft(0, run=2, count=4, first=7), made=1, chosen=chosen)
    return speculation


@pytest.mark.parametrize(
    ("fixed_s", "row_s", "right", "wrong", "rows", "tried"),
    [
        (2e-3, 1e-5, 8, 2, 1, 8),  # a row costs next to nothing: 0.8 ** 8 is still worth it
        (2e-3, 1e-5, 1, 9, 1, 2),  # 0.1 and 0.01 are above 1 / 201, 0.001 is not
        (1e-3, 1e-3, 8, 2, 1, 3),  # a row costs half a step: 0.8 ** 3 is above 0.5
        (1e-3, 1e-3, 8, 2, 30, 0),  # under load one more row costs as much as it brings
        (1e-3, 1e-5, 8, 2, 30, 6),  # or not: 0.8 ** 6 is above 300 / 1300
    ],
)
def test_as_many_drafts_as_pay(
    fixed_s: float, row_s: float, right: int, wrong: int, rows: int, tried: int
) -> None:
    draft = Draft(0, run=2, count=8, first=7)
    learned(fixed_s, row_s, right, wrong).decide([draft], rows, most_rows=64)
    assert draft.tried == tried


def test_drafts_share_their_rows_longer_runs_first() -> None:
    drafts = [Draft(i, run=run, count=8, first=7) for i, run in enumerate([1, 4, 2])]
    speculation = learned(1.0, 0.0, 9, 1)
    for draft in drafts:
        for _ in range(300):
            speculation.learn(replace(draft, tried=8), made=9, chosen=7)
    speculation.decide(drafts, 3, most_rows=12)
    assert [draft.tried for draft in drafts] == [0, 8, 4]


async def test_copied_spans_come_several_at_a_time(checkpoint: Checkpoint, direct: Direct) -> None:
    asked = GenerationSettings(max_new_tokens=40)
    inputs = [direct.ids(text) for text in texts(30)]
    made = {}
    for speculation in (False, True):
        batches: list[BatchRan] = []
        async with running(checkpoint, batches, speculation=speculation) as client:
            outcomes = [
                await client.run(EngineRequest(f"{i}", ids, asked)) for i, ids in enumerate(inputs)
            ]
        tokens = sum(batch.output_tokens for batch in batches)
        assert tokens == sum(len(o.ids) + 1 for o in outcomes if o.reason == "stop") + sum(
            len(o.ids) for o in outcomes if o.reason != "stop"
        )
        made[speculation] = [o.ids for o in outcomes], len(batches)
        accepted = sum(batch.accepted for batch in batches)
        assert (accepted > 0) is speculation
        assert accepted <= sum(batch.drafted for batch in batches)
        assert len(batches) == tokens - accepted
    assert made[True][0] == made[False][0]
    assert made[True][1] < 0.8 * made[False][1]


def test_rows_of_a_card() -> None:
    # 6 layers of keys and values, 8 heads of 64, 713 positions, two bytes; logits four times, in a
    # step that is launched and in one that is captured.
    assert row_bytes(T5_SMALL, PLAN, 2) == 6 * 2 * 512 * 713 * 2 + 2 * (2 + 3 * 4) * 32_128
    fixed = encoder_bytes(T5_SMALL, PLAN, 2)
    row = row_bytes(T5_SMALL, PLAN, 2)
    free = (LIBRARIES + fixed + 10.5 * row) / 0.9
    assert plan_rows(T5_SMALL, PLAN, int(free)) == 10
    assert plan_rows(T5_SMALL, replace(PLAN, rows=7), int(free)) == 7
    assert plan_rows(T5_SMALL, PLAN, 80 << 30) == 256
    with pytest.raises(CheckpointError, match=r"max_batch_size 11 .*: 10 rows fit"):
        plan_rows(T5_SMALL, replace(PLAN, rows=11), int(free))
    with pytest.raises(CheckpointError, match=r"max_batch_size 1 .*: 0 rows fit"):
        plan_rows(T5_SMALL, PLAN, 1 << 20)


def test_slots_and_lanes_grow_and_none_is_lost() -> None:
    state = State(T5_SMALL, TokenConstraints(), Precision.BFLOAT16, lanes=4, steps=16, source=32)
    held = []
    for beams, steps, source in [(1, 4, 3), (3, 40, 100), (2, 16, 32), (5, 200, 7)]:
        request = EngineRequest(
            "r", list(range(source)), GenerationSettings(num_beams=beams, max_new_tokens=steps)
        )
        slot = state.admit(request)
        assert slot not in held
        held.append(slot)
        state.check(held)
        assert state.sources[slot, :source].tolist() == list(range(source))
    assert (state.lane_count, state.steps_room, state.source_room) == (11, 224, 128)
    state.release(held.pop(1))
    state.check(held)
    with pytest.raises(AssertionError, match="leaked"):
        state.check(held[1:])


def test_precision_of_a_checkpoint(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"d_model": 256, "d_ff": 4_096, "num_layers": 4, "num_heads": 4, "d_kv": 64}
    T5ForConditionalGeneration(T5Config(vocab_size=30_000, **shape)).save_pretrained(tmp_path)
    large = resolve(str(tmp_path))
    assert large.parameters == sum(
        p.numel() for p in T5ForConditionalGeneration.from_pretrained(tmp_path).parameters()
    )
    for has, told in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(native, "bfloat16", lambda has=has: has)
        assert build._dtype(large, "cpu") == told
        assert build._dtype(checkpoint, "cpu") == "float32"
    assert build._dtype(checkpoint, "cuda") == "bfloat16"


def test_bytes_need_a_cpu_with_kernels(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    plan = Plan(device="cpu", dtype="int8", rows=2, steps=8, source=32)
    with pytest.raises(CheckpointError, match="'int8' needs a CPU"):
        make_runner(checkpoint, plan)
    with caplog.at_level(logging.WARNING):
        make_runner(checkpoint, replace(plan, dtype="float32"))
    assert "kernels are not built" in caplog.text


@pytest.mark.skipif(not native.bfloat16(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("beams", [1, 4])
async def test_low_precision_says_nearly_the_same(
    checkpoint: Checkpoint, direct: Direct, dtype: str, beams: int
) -> None:
    asked = GenerationSettings(
        num_beams=beams, max_new_tokens=40, no_repeat_ngram_size=3, min_new_tokens=3
    )
    inputs = [direct.ids(text) for text in texts(60)]
    async with running(checkpoint, dtype=dtype) as client:
        outcomes = await asyncio.gather(
            *(client.run(EngineRequest(f"{i}", ids, asked)) for i, ids in enumerate(inputs))
        )
    told = [direct.tokenizer.decode(o.ids) for o in outcomes if isinstance(o, Finished)]
    options = {"num_beams": beams, "max_new_tokens": 40, "no_repeat_ngram_size": 3}
    truth = [
        direct.tokenizer.decode(direct.generate(ids, min_new_tokens=3, **options)) for ids in inputs
    ]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    scores = [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(truth, told, strict=True)]
    assert sum(scores) / len(scores) > 0.85


def test_settings_reach_the_engine() -> None:
    assert EngineSettings().max_batch_size == 0
    assert ModelSettings(dtype="int8").dtype == "int8"
    with pytest.raises(ValueError, match="dtype"):
        ModelSettings(dtype="float16")
