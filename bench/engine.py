"""The engine against its peers: `python -m bench.engine`.

A random model of T5-small's shape (speed does not depend on what the weights say), texts of random
tokens, lengths fixed beforehand so that everyone does the same work. Peers: `transformers`'
`generate()` and CTranslate2. They batch statically; so that a batch does not wait for its longest
member they get the requests *sorted by output length*, which no server knows beforehand, and the
best of several batch sizes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import ctranslate2
import torch
from transformers import T5Config, T5ForConditionalGeneration

from serve_app.engine.checkpoint import resolve
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.protocol import EngineRequest, GenerationSettings

RESULTS = Path(__file__).parent / "results"
_VOCABULARY = 32_128


@dataclass(frozen=True)
class Work:
    """A request: its input ids and how many tokens to generate."""

    ids: list[int]
    tokens: int


Engine = Callable[[list[Work], int], float]  # works, beams -> seconds


def log_normal(rng: random.Random, median: int, low: int, high: int) -> int:
    """A length; sigma 0.7."""
    return round(min(max(median * rng.lognormvariate(0, 0.7), low), high))


def mixed(count: int, seed: int = 1) -> list[Work]:
    """Inputs of 32 to 512 tokens (median 180), outputs of 16 to 200 (median 60)."""
    rng = random.Random(seed)
    return [
        Work(
            [*rng.choices(range(3, 32_000), k=log_normal(rng, 180, 32, 512) - 1), 1],
            log_normal(rng, 60, 16, 200),
        )
        for _ in range(count)
    ]


def ours(folder: Path, threads: int) -> Engine:
    """The continuous engine; all requests submitted at once, in the order they come."""
    checkpoint = resolve(str(folder))

    async def run(works: list[Work], beams: int) -> float:
        client = EngineClient(
            lambda emit: ContinuousEngine(
                checkpoint, emit, threads=threads, max_batch_size=32 * beams,
                max_waiting_requests=100_000, max_waiting_tokens=100_000_000,
            )
        )  # fmt: skip
        began = time.perf_counter()
        await asyncio.gather(
            *(
                client.run(EngineRequest(f"{i}", w.ids, _settings(w, beams)))
                for i, w in enumerate(works)
            )
        )
        seconds = time.perf_counter() - began
        await asyncio.to_thread(client.close)
        return seconds

    return lambda works, beams: asyncio.run(run(works, beams))


def _settings(work: Work, beams: int) -> GenerationSettings:
    return GenerationSettings(
        num_beams=beams,
        min_new_tokens=work.tokens,
        max_new_tokens=work.tokens,
        no_repeat_ngram_size=3 if beams > 1 else 0,
    )


def hugging_face(folder: Path, batch: int) -> Engine:
    """`generate()` in float32."""
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def run(works: list[Work], beams: int) -> float:
        began = time.perf_counter()
        ordered = sorted(works, key=lambda work: work.tokens)
        for start in range(0, len(ordered), batch):
            part = ordered[start : start + batch]
            width = max(len(work.ids) for work in part)
            model.generate(
                input_ids=torch.tensor([w.ids + [0] * (width - len(w.ids)) for w in part]),
                attention_mask=torch.tensor(
                    [[1] * len(w.ids) + [0] * (width - len(w.ids)) for w in part]
                ),
                do_sample=False,
                num_beams=beams,
                min_new_tokens=part[-1].tokens,
                max_new_tokens=part[-1].tokens,
                no_repeat_ngram_size=3 if beams > 1 else None,
            )
        return time.perf_counter() - began

    return run


def ctranslate(folder: Path, batch: int, kind: str, threads: int) -> Engine:
    """CTranslate2, its own batching switched off in favour of sorted batches."""
    translator = ctranslate2.Translator(
        str(folder), device="cpu", compute_type=kind, inter_threads=1, intra_threads=threads
    )
    names = json.loads((folder / "shared_vocabulary.json").read_text())

    def run(works: list[Work], beams: int) -> float:
        ordered = sorted(works, key=lambda work: work.tokens)
        began = time.perf_counter()
        for start in range(0, len(ordered), batch):
            part = ordered[start : start + batch]
            translator.translate_batch(
                [[names[i] for i in work.ids] for work in part],
                beam_size=beams,
                min_decoding_length=part[-1].tokens,
                max_decoding_length=part[-1].tokens,
                no_repeat_ngram_size=3 if beams > 1 else 0,
                max_input_length=0,
            )
        return time.perf_counter() - began

    return run


def main() -> None:
    """Run the workloads and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    arguments = parser.parse_args()
    threads = arguments.threads
    torch.set_num_threads(threads)
    works = mixed(arguments.requests)
    single = [Work([*random.Random(2).choices(range(3, 32_000), k=255), 1], 64)]
    tokens = sum(work.tokens for work in works)

    with tempfile.TemporaryDirectory() as scratch:
        folder, converted = Path(scratch) / "t5", Path(scratch) / "ct2"
        torch.manual_seed(0)
        shape = T5Config(
            vocab_size=_VOCABULARY, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8,
            decoder_start_token_id=0,
        )  # fmt: skip
        T5ForConditionalGeneration(shape).save_pretrained(folder)
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted))

        engines: dict[str, list[Engine]] = {
            "t5-serve float32": [ours(folder, threads)],
            "transformers float32": [hugging_face(folder, size) for size in arguments.batches],
        }
        for kind in ("float32", "int8"):
            engines[f"CTranslate2 {kind}"] = [
                ctranslate(converted, size, kind, threads) for size in arguments.batches
            ]
        rows: list[dict[str, object]] = []
        for beams in (1, 4):
            for name, variants in engines.items():
                variants[0](single, beams)  # warm
                alone = min(variants[0](single, beams) for _ in range(3))
                best = min(variant(works, beams) for variant in variants)
                row = {
                    "engine": name,
                    "beams": beams,
                    "tokens_per_s": tokens / best,
                    "single_s": alone,
                }
                rows.append(row)
                speed = f"{tokens / best:7.0f} tokens/s, alone {alone:.2f} s"
                print(f"{name:22s} beams {beams}: {speed}", flush=True)

    print(f"\n{arguments.requests} requests, {tokens} tokens, {threads} threads\n")
    print("| engine | beams | tokens/s | t5-serve is | alone, s | t5-serve takes |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        own = next(r for r in rows if r["beams"] == row["beams"])
        print(
            f"| {row['engine']} | {row['beams']} | {row['tokens_per_s']:.0f} "
            f"| {own['tokens_per_s'] / row['tokens_per_s']:.2f}× | {row['single_s']:.2f} "  # type: ignore[operator]
            f"| {own['single_s'] / row['single_s']:.2f}× |"  # type: ignore[operator]
        )
    RESULTS.mkdir(exist_ok=True)
    about = {
        "cpu": platform.processor() or platform.machine(),
        "threads": threads,
        "requests": arguments.requests,
        "versions": {name: version(name) for name in ("torch", "transformers", "ctranslate2")},
        "rows": rows,
    }
    (RESULTS / "engine.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
