"""What the precisions change in the demo model's summaries: `python -m bench.precision`.

Held-out texts: documentation that comes with Python, of which the demo model has seen none.
"""

from __future__ import annotations

import asyncio

from rouge_score import rouge_scorer

from serve_app.engine.checkpoint import resolve
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.protocol import EngineRequest, Finished, GenerationSettings
from serve_app.engine.tokenizer import Tokenizer
from tests.texts import texts

_TEXTS = 300


async def summaries(dtype: str, beams: int) -> list[str]:
    """Of all texts, in this precision."""
    checkpoint = resolve("demo")
    tokenizer = Tokenizer(checkpoint)
    settings = GenerationSettings(
        num_beams=beams, min_new_tokens=3, max_new_tokens=64, no_repeat_ngram_size=3
    )
    client = EngineClient(lambda emit: ContinuousEngine(checkpoint, emit, dtype=dtype))

    async def one(index: int, text: str) -> str:
        ids, _ = tokenizer.model_input(checkpoint.prefix + text, checkpoint.max_input_tokens)
        outcome = await client.run(EngineRequest(f"{index}", ids, settings))
        assert isinstance(outcome, Finished)
        return tokenizer.decode(list(outcome.ids))

    try:
        return await asyncio.gather(*(one(i, text) for i, text in enumerate(texts(_TEXTS))))
    finally:
        await asyncio.to_thread(client.close)


def main() -> None:
    """Print a Markdown table."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    print("| search | precision | identical to float32 | ROUGE-L against float32 |")
    print("|---|---|---|---|")
    for beams in (1, 4):
        exact = asyncio.run(summaries("float32", beams))
        for dtype in ("bfloat16", "int8"):
            found = asyncio.run(summaries(dtype, beams))
            same = sum(a == b for a, b in zip(exact, found, strict=True))
            scores = [
                scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(exact, found, strict=True)
            ]
            label = "greedy" if beams == 1 else f"{beams} beams"
            score = 100 * sum(scores) / len(scores)
            print(f"| {label} | {dtype} | {same} of {_TEXTS} | {score:.1f} |")


if __name__ == "__main__":
    main()
