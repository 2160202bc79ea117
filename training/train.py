"""Train the demo model: seeded, resumable, bounded by minutes of wall time.

`python -m training.train --minutes 90`. Interrupted, the same command goes on from the last
checkpoint. The learning rate follows the share of the minutes used, so that the schedule ends
well whatever the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import T5ForConditionalGeneration

from training import WORK
from training.data import load
from training.model import new_model
from training.objectives import Objectives, Pair

_PEAK_RATE = 1e-3
_WARMUP_STEPS = 100
_EMA = 0.999
_TOKENS_PER_BATCH = 3_072  # padded source and target tokens
_POOL = 2_048  # pairs sorted by length at a time, so that batches hold little padding
_CHECKPOINT_S = 120
_LABEL_SMOOTHING = 0.05


@dataclass
class Progress:
    """Where training stands. `used_s` is wall time spent training, over all runs."""

    step: int = 0
    pairs: int = 0
    used_s: float = 0.0
    curve: list[tuple[float, int, float]] = field(default_factory=list)


def copy_share(used: float) -> float:
    """Share of copying practice among the pairs after `used` (0 to 1) of the time."""
    return max(0.2 - 0.5 * used, 0.04)


def max_source(used: float) -> int:
    """Encoder tokens after `used` of the time: short inputs first, long ones at the end."""
    return 64 if used < 0.3 else 112 if used < 0.85 else 256


def batches(
    tokenizer: Tokenizer, seed: int, progress: Progress, minutes: float
) -> Iterator[list[Pair]]:
    """Endless batches of similar length. Drawn anew from the step's own seed after a resume."""
    examples = load("train")
    rng = random.Random(seed * 1_000_003 + progress.step)
    while True:
        used = progress.used_s / (minutes * 60)
        make = Objectives(tokenizer, max_source(used))
        pool = [
            make.copy(example, rng) if rng.random() < copy_share(used) else make.synopsis(example)
            for example in rng.sample(examples, min(_POOL, len(examples)))
        ]
        pool.sort(key=lambda pair: (len(pair.target) // 16, len(pair.source)))
        groups: list[list[Pair]] = [[]]
        longest = 0
        for pair in pool:
            longest = max(longest, len(pair.source) + len(pair.target))
            if longest * (len(groups[-1]) + 1) > _TOKENS_PER_BATCH:
                groups.append([])
                longest = len(pair.source) + len(pair.target)
            groups[-1].append(pair)
        rng.shuffle(groups)
        yield from groups


def tensors(batch: list[Pair]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (batch, source), `labels` (batch, target), all int64."""
    width = max(len(pair.source) for pair in batch)
    depth = max(len(pair.target) for pair in batch)
    return {
        "input_ids": torch.tensor([p.source + [0] * (width - len(p.source)) for p in batch]),
        "attention_mask": torch.tensor(
            [[1] * len(p.source) + [0] * (width - len(p.source)) for p in batch]
        ),
        "labels": torch.tensor([p.target + [-100] * (depth - len(p.target)) for p in batch]),
    }


def loss_of(model: T5ForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Label-smoothed cross-entropy. Logits, the largest part, are made for real tokens only."""
    labels = inputs["labels"]
    mask = inputs["attention_mask"]
    encoded = model.encoder(input_ids=inputs["input_ids"], attention_mask=mask)
    hidden = model.decoder(
        input_ids=model._shift_right(labels),
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    real = labels != -100
    # T5 v1.0 scales the decoder's output before the tied embedding.
    logits = model.lm_head(hidden[real] * model.config.d_model**-0.5)
    return torch.nn.functional.cross_entropy(logits, labels[real], label_smoothing=_LABEL_SMOOTHING)


def learning_rate(step: int, used: float) -> float:
    """Linear warm-up, then linear decay to nothing at the end of the time."""
    return _PEAK_RATE * min(1.0, (step + 1) / _WARMUP_STEPS) * max(1.0 - used, 0.0)


def save(path: Path, content: dict[str, object]) -> None:
    """Write a checkpoint so that an interruption leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def train(minutes: float, seed: int, folder: Path = WORK / "run", max_steps: int | None = None):
    """Train until the minutes are used; returns the model and its averaged weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(WORK / "tokenizer" / "tokenizer.json"))
    model = new_model(tokenizer.get_vocab_size(), seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    average = {name: value.clone() for name, value in model.state_dict().items()}
    progress = Progress()
    path = folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average = saved["average"]
        progress = Progress(**saved["progress"])
        print(f"resumed at step {progress.step}", flush=True)

    model.train()
    last_save = last_print = time.monotonic()
    recent: list[float] = []

    def checkpoint() -> None:
        content = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
            "progress": asdict(progress),
        }
        save(path, content)
        (folder / "progress.json").write_text(json.dumps(asdict(progress)))

    for batch in batches(tokenizer, seed, progress, minutes):
        began = time.monotonic()
        used = progress.used_s / (minutes * 60)
        if used >= 1 or (max_steps is not None and progress.step >= max_steps):
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress.step, used)
        inputs = tensors(batch)
        loss = loss_of(model, inputs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(_EMA, (1 + progress.step) / (10 + progress.step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        recent.append(loss.item())
        progress.step += 1
        progress.pairs += len(batch)
        now = time.monotonic()
        progress.used_s += now - began
        if now - last_print > 15:
            mean = sum(recent) / len(recent)
            progress.curve.append((round(progress.used_s), progress.pairs, round(mean, 4)))
            rate = progress.pairs / progress.used_s
            print(
                f"{progress.used_s / 60:6.1f} min  step {progress.step:6d}  "
                f"{progress.pairs:8d} pairs  {rate:5.1f}/s  loss {mean:.3f}",
                flush=True,
            )
            recent, last_print = [], now
        if now - last_save > _CHECKPOINT_S:
            checkpoint()
            last_save = now
    checkpoint()
    return model, average


def averaged(folder: Path = WORK / "run") -> T5ForConditionalGeneration:
    """The model with the averaged weights of the last checkpoint."""
    tokenizer = Tokenizer.from_file(str(WORK / "tokenizer" / "tokenizer.json"))
    model = new_model(tokenizer.get_vocab_size(), 0)
    model.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["average"])
    return model.eval()


def main() -> None:
    """Parse arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=WORK / "run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.minutes, arguments.seed, arguments.folder)


if __name__ == "__main__":
    main()
