"""Train the demo model: seeded, resumable, bounded by minutes of wall time.

`python -m training.train --minutes 7` on a GPU; on two cores as many minutes as there are.
Interrupted, the same command goes on from the last checkpoint. Learning rate and stages follow the
share of the minutes used, so that the schedule ends well whatever the machine's speed. Needs
`corpus.npz` alone; torch, transformers (for the initial weights) and numpy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training import WORK
from training.corpus import CORPUS, Corpus, read
from training.model import config, new_model
from training.muon import Muon
from training.net import Net, from_transformers
from training.objectives import Objectives, Pair, batches, held_out, padded, shape_of, stage_of

MUON_RATE = 0.02
ADAM_RATE = 1e-2  # embeddings have entries of about 1
_WARMUP = 0.01  # share of the time
_DECAY = 0.6  # share of the time in which the rates fall to nothing, at the end
_EMA = 0.998
_LABEL_SMOOTHING = 0.1
_PRINT_S = {"cuda": 5, "cpu": 120}
_CHECKPOINT_S = 120


@dataclass
class Progress:
    """Where training stands. `used_s` is wall time spent training, over all runs.

    `curve` holds seconds, pairs, training loss and held-out loss (nats per token).
    """

    step: int = 0
    pairs: int = 0
    tokens: int = 0
    used_s: float = 0.0
    curve: list[tuple[float, int, float, float]] = field(default_factory=list)


class Batches(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Endless batches (source, target), int64, padded with 0; each worker draws its own."""

    def __init__(self, corpus: Corpus, seed: int, used: Any, max_tokens: int) -> None:
        self._corpus, self._seed, self._used, self._max_tokens = corpus, seed, used, max_tokens

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        make = Objectives(self._corpus, self._seed * 1_000 + (worker.id if worker else 0))
        waiting: dict[tuple[int, int], list[Pair]] = {}
        while True:
            pair = make.draw(stage_of(self._used.value))
            shape = shape_of(pair)
            alike = waiting.setdefault(shape, [])
            alike.append(pair)
            if len(alike) >= max(self._max_tokens // sum(shape), 1):
                yield tensors(waiting.pop(shape))


def tensors(batch: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, source) and (batch, target), int64."""
    shapes = [shape_of(pair) for pair in batch]
    source = padded([pair.source for pair in batch], max(source for source, _ in shapes))
    target = padded([pair.target for pair in batch], max(target for _, target in shapes))
    return torch.from_numpy(source), torch.from_numpy(target)


def loss_of(net: Net, source: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy per real target token."""
    logits = net(source, target).flatten(0, 1).float()
    return functional.cross_entropy(
        logits, target.flatten(), ignore_index=0, label_smoothing=smoothing
    )


def rate(used: float) -> float:
    """Share of the peak rates: linear warm-up, flat, linear to nothing at the end of the time."""
    return min(used / _WARMUP, 1.0, max(1.0 - used, 0.0) / _DECAY)


class Trainer:
    """Weights, optimizers, average and progress, and how they are kept."""

    def __init__(self, vocabulary: int, seed: int, device: str, rates: tuple[float, float]) -> None:
        self._rates = rates
        shape = config(vocabulary)
        initial = new_model(vocabulary, seed).state_dict()
        self.net = from_transformers(Net(shape), initial).to(device)
        matrices = self.net.matrices()
        inside = {id(parameter) for parameter in matrices}
        others = [p for p in self.net.parameters() if id(p) not in inside]
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=rates[0]),
            torch.optim.AdamW(others, lr=rates[1], betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self._parameters = list(self.net.parameters())
        self.average = [p.detach().clone() for p in self._parameters]
        self.progress = Progress()

    def step(self, source: torch.Tensor, target: torch.Tensor, used: float) -> torch.Tensor:
        """One step; returns its loss, still on the device."""
        for optimizer, peak in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(used)
        loss = loss_of(self.net, source, target, _LABEL_SMOOTHING)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step = self.progress.step
        with torch.no_grad():
            decay = min(_EMA, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.average, self._parameters, 1 - decay)
        self.progress.step += 1
        self.progress.pairs += len(source)
        self.progress.tokens += source.numel() + target.numel()
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Loss of the averaged weights on held-out batches."""
        trained = [p.detach().clone() for p in self._parameters]
        for parameter, value in zip(self._parameters, self.average, strict=True):
            parameter.copy_(value)
        self.net.eval()
        total = count = 0.0
        for source, target in parts:
            real = int((target != 0).sum())
            total += float(loss_of(self.net, source, target, 0.0)) * real
            count += real
        self.net.train()
        for parameter, value in zip(self._parameters, trained, strict=True):
            parameter.copy_(value)
        return total / count

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averaged weights by name, on the CPU."""
        names = [name for name, _ in self.net.named_parameters()]
        return {n: value.cpu() for n, value in zip(names, self.average, strict=True)}

    def save(self, path: Path) -> None:
        """Write a checkpoint so that an interruption leaves the old one or the new one."""
        content = {
            "net": self.net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "average": self.average,
            "progress": asdict(self.progress),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(content, temporary)
        os.replace(temporary, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        saved = torch.load(path, weights_only=True, map_location=self.average[0].device)
        self.net.load_state_dict(saved["net"])
        for optimizer, state in zip(self._optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.average = saved["average"]
        self.progress = Progress(**saved["progress"])


def train(
    minutes: float,
    seed: int,
    folder: Path,
    device: str,
    corpus: Corpus,
    max_tokens: int = 32_768,
    workers: int = 0,
    checkpoints: bool = True,
    rates: tuple[float, float] = (MUON_RATE, ADAM_RATE),
) -> Trainer:
    """Train until the minutes are used; progress goes to `progress.json` in `folder` too."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(corpus.vocabulary, seed, device, rates)
    path = folder / "checkpoint.pt"
    if checkpoints and path.exists():
        trainer.resume(path)
        print(f"resumed at step {trainer.progress.step}", flush=True)
    progress = trainer.progress
    used = multiprocessing.Value("d", progress.used_s / (minutes * 60), lock=False)
    loader = DataLoader(
        Batches(corpus, seed + progress.step, used, max_tokens),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=device != "cpu",
        multiprocessing_context="fork" if workers else None,
    )
    on_device = [
        (source.to(device), target.to(device))
        for source, target in map(tensors, batches(held_out(corpus), max_tokens))
    ]
    trainer.net.train()
    began = last_save = last_print = time.monotonic()
    before = progress.used_s
    losses: list[torch.Tensor] = []
    for source, target in loader:
        progress.used_s = before + time.monotonic() - began
        used.value = progress.used_s / (minutes * 60)
        if used.value >= 1:
            break
        source, target = source.to(device, non_blocking=True), target.to(device, non_blocking=True)
        losses.append(trainer.step(source, target, used.value))
        now = time.monotonic()
        if now - last_print > _PRINT_S[device]:
            mean = float(torch.stack(losses).mean())
            if mean != mean:
                raise FloatingPointError(f"the loss is not a number at step {progress.step}")
            held = trainer.held_out_loss(on_device)
            point = (round(progress.used_s, 1), progress.pairs, round(mean, 4), round(held, 4))
            progress.curve.append(point)
            print(
                f"{progress.used_s:7.1f} s  step {progress.step:6d}  {progress.pairs:9d} pairs  "
                f"{progress.tokens / progress.used_s:9.0f} tokens/s  loss {mean:.3f}  "
                f"held out {held:.3f}",
                flush=True,
            )
            losses, last_print = [], time.monotonic()
        if checkpoints and now - last_save > _CHECKPOINT_S:
            trainer.save(path)
            last_save = now
    print(f"held out {trainer.held_out_loss(on_device):.4f}", flush=True)
    if checkpoints:
        trainer.save(path)
    (folder / "progress.json").write_text(json.dumps(asdict(progress)))
    return trainer


def main() -> None:
    """Parse arguments, train, write the averaged weights."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=WORK / "run")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--max-tokens", type=int, default=32_768 if gpu else 4_096)
    parser.add_argument(
        "--workers", type=int, default=max((os.cpu_count() or 2) - 2, 0) if gpu else 0
    )
    parser.add_argument("--muon-rate", type=float, default=MUON_RATE, help="peak")
    parser.add_argument("--adam-rate", type=float, default=ADAM_RATE, help="peak")
    parser.add_argument("--no-checkpoints", action="store_true", help="averaged weights only")
    arguments = parser.parse_args()
    trainer = train(
        arguments.minutes,
        arguments.seed,
        arguments.folder,
        "cuda" if gpu else "cpu",
        read(arguments.corpus),
        arguments.max_tokens,
        arguments.workers,
        not arguments.no_checkpoints,
        (arguments.muon_rate, arguments.adam_rate),
    )
    halves = {name: value.half() for name, value in trainer.averaged().items()}
    torch.save(halves, arguments.folder / "averaged.pt")


if __name__ == "__main__":
    main()
