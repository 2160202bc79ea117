"""Judge the demo model in the package: `python -m training.evaluate`.

On held-out package descriptions: ROUGE against the human synopses beside simple baselines, how
much of each summary is said in its source, and how many outputs are empty, looping or cut off.
Then ten examples nobody picked, and texts of other kinds, for a reader to judge.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from transformers import T5ForConditionalGeneration

from quality.scores import looping
from serve_app.api.splitting import sentences
from serve_app.engine.checkpoint import resolve
from serve_app.engine.tokenizer import Tokenizer
from training import EXPORTED, PREFIX
from training.data import Example, load, shingles

PROSE = Path(__file__).parent / "prose.jsonl"
_BATCH = 32
_MAX_NEW_TOKENS = 64
# Words that carry no content of their own.
_FUNCTION_WORDS = frozenset(
    "a an and any are as at be been but by can could did do does each either every few for from "
    "had has have how if in into is it its itself just like may might more most much must no nor "
    "not of off on one only or other our out over own per shall she should so some such than that "
    "the their them then there these they this those through to too under until up upon use used "
    "uses using various very via was we were what when where which while who whose will with "
    "within without would you your".split()
)
_stem = functools.cache(PorterStemmer().stem)


def content_words(text: str) -> list[str]:
    """Stems of the words that say something, in order."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [_stem(word) for word in words if word not in _FUNCTION_WORDS and len(word) > 1]


def faithfulness(summary: str, source: str) -> float | None:
    """Share of the summary's content words that its source says too, by stem."""
    said = content_words(summary)
    known = set(content_words(source))
    return sum(word in known for word in said) / len(said) if said else None


class Summaries:
    """The exported model, as the service runs it."""

    def __init__(self, folder: Path = EXPORTED) -> None:
        checkpoint = resolve(str(folder))
        self._tokenizer = Tokenizer(checkpoint)
        self._settings = checkpoint.defaults
        self._model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str], num_beams: int) -> Iterator[tuple[str, bool]]:
        """Summaries in order, each with whether it ended by itself."""
        for begin in range(0, len(texts), _BATCH):
            rows = [
                self._tokenizer.model_input(PREFIX + text, 512)[0]
                for text in texts[begin : begin + _BATCH]
            ]
            width = max(map(len, rows))
            output = self._model.generate(
                input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
                attention_mask=torch.tensor(
                    [[1] * len(row) + [0] * (width - len(row)) for row in rows]
                ),
                num_beams=num_beams,
                do_sample=False,
                min_new_tokens=self._settings.min_new_tokens,
                max_new_tokens=_MAX_NEW_TOKENS,
                no_repeat_ngram_size=self._settings.no_repeat_ngram_size,
            )
            for row in output.tolist():
                yield self._tokenizer.decode(row), 1 in row


def first_sentence(text: str) -> str:
    """The strongest simple baseline."""
    span = sentences(text)[0]
    return text[span.start : span.end].strip()


def novel(examples: list[Example]) -> list[int]:
    """Examples unlike anything in the training part: no text there says a tenth of
    their five-word runs, and none has their synopsis.
    """
    train = load("train")
    synopses = {example.synopsis.lower() for example in train}
    runs = [shingles(example.text) for example in examples]
    wanted = set().union(*runs)
    shared = [0] * len(examples)
    for example in train:
        if known := shingles(example.text) & wanted:
            shared = [max(s, len(known & run)) for s, run in zip(shared, runs, strict=True)]
    return [
        i
        for i, example in enumerate(examples)
        if shared[i] < 0.1 * len(runs[i]) and example.synopsis.lower() not in synopses
    ]


def score(name: str, examples: list[Example], outputs: list[tuple[str, bool]]) -> str:
    """A row of the table, in Markdown. `outputs` are summaries and whether they ended."""
    count = len(examples)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    rouge1 = rougel = 0.0
    faithful: list[float] = []
    broken = 0
    for example, (summary, whole) in zip(examples, outputs, strict=True):
        scores = scorer.score(example.synopsis, summary)
        rouge1 += scores["rouge1"].fmeasure
        rougel += scores["rougeL"].fmeasure
        if (share := faithfulness(summary, example.text)) is not None:
            faithful.append(share)
        broken += not summary.strip() or not whole or looping(summary)
    share = 100 * sum(faithful) / max(len(faithful), 1)
    return (
        f"| {name} | {100 * rouge1 / count:.1f} | {100 * rougel / count:.1f} "
        f"| {share:.1f} % | {100 * broken / count:.1f} % |"
    )


def main() -> None:
    """Print the tables and the examples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="held-out descriptions")
    parser.add_argument("--folder", type=Path, default=EXPORTED)
    arguments = parser.parse_args()
    examples = load("test")[: arguments.count]
    texts = [example.text for example in examples]
    print(f"{len(examples)} held-out descriptions\n")
    print("| | ROUGE-1 | ROUGE-L | faithful | empty, looping or cut off |")
    print("|---|---|---|---|---|")
    baselines = {
        "first sentence": [first_sentence(text) for text in texts],
        "first 6 words": [" ".join(text.split()[:6]) for text in texts],
        "first 12 words": [" ".join(text.split()[:12]) for text in texts],
    }
    for name, summaries in baselines.items():
        print(score(name, examples, [(summary, True) for summary in summaries]), flush=True)
    model = Summaries(arguments.folder)
    greedy: list[str] = []
    apart = novel(examples)
    few = [examples[i] for i in apart]
    for name, beams in (("**demo model, greedy**", 1), ("**demo model, 4 beams**", 4)):
        outputs = list(model(texts, beams))
        print(score(name, examples, outputs), flush=True)
        row = score(f"the same, the {len(few)} least alike", few, [outputs[i] for i in apart])
        print(row, flush=True)
        greedy = greedy or [text for text, _ in outputs]

    print("\nThe first ten (greedy; the human synopsis after the dash):\n")
    for example, summary in zip(examples[:10], greedy, strict=False):
        print(f"- {example.id}: “{summary}” — “{example.synopsis}”")

    prose = [json.loads(line) for line in PROSE.read_text(encoding="utf-8").splitlines()]
    print("\nTexts of other kinds (greedy):\n")
    outputs = list(model([row["text"] for row in prose], 1))
    shares = [faithfulness(o[0], row["text"]) or 0.0 for o, row in zip(outputs, prose, strict=True)]
    for row, (summary, _) in zip(prose, outputs, strict=True):
        print(f"- {row['subject']} ({row['kind']}): “{summary}”")
    print(f"\nfaithful: {100 * sum(shares) / len(shares):.1f} %")


if __name__ == "__main__":
    main()
