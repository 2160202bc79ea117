"""Two hours of mixed load, and whether everything returns to where it began.

    python -m bench.soak --minutes 120 --out build/soak

`t5-serve run` with two replicas of each deployment, under texts short and long, beams, streams,
batches, deadlines, and clients that leave. After a warm-up and at the end the load pauses until no
slot is in use, and memory, file descriptors and threads of every process are read at rest; between
them they are sampled under load, for the plot. Exit status 1: something grew beyond its bound, a
slot stayed in use, a process is gone, or a request did not end as it should.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import psutil

from tests.chaos.judge import counts, label, lost
from tests.chaos.load import Load, Request
from tests.chaos.service import WORK, LocalService, started, until

SAMPLE_S = 5.0
SHOWN_S = 30.0
REST_S = 15.0
_WARM = 0.2  # of the time, at most
_WARM_S = 600.0
# Bounds of growth, from rest to rest. Beside the share, memory may move by as much as it did while
# the service rested the first time.
RSS_SHARE = 0.10
MORE_RSS = 8 << 20  # at least: a tenth of the raylet is less than its allocator takes at once
MORE_FDS = 2  # a connection of Ray's own that is being made again
MORE_THREADS = 2  # a pool that reaches its size late
PLOTTED = ("engine", "api", "proxy", "controller", "gcs", "raylet")
MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One process at one moment: seconds from the beginning, bytes, counts."""

    at: float
    process: str
    rss: int
    fds: int
    threads: int


@dataclass(frozen=True)
class Row:
    """One process at rest, after the warm-up and at the end: medians. `over`: what grew."""

    process: str
    rss: tuple[float, float]
    rss_noise: float
    fds: tuple[float, float]
    threads: tuple[float, float]
    over: list[str]


@dataclass
class Soak:
    """What was seen."""

    samples: list[Sample] = field(default_factory=list)
    slots: list[tuple[float, float, float]] = field(default_factory=list)  # at, used, waiting
    began: float = field(default_factory=time.monotonic)

    def look(self, service: LocalService) -> list[Sample]:
        """Sample all processes now."""
        at, found = time.monotonic() - self.began, []
        for process in service.family():
            with contextlib.suppress(psutil.Error), process.oneshot():
                name = f"{service.role(process)} {process.pid}"
                rss, threads = process.memory_info().rss, process.num_threads()
                found.append(Sample(at, name, rss, process.num_fds(), threads))
        return found


def rest(soak: Soak, service: LocalService) -> list[Sample]:
    """Samples at rest: no load, no slot in use.

    Raises:
        AssertionError: a slot stays in use, or a request waits.
    """
    until(service.idle, "no slot is in use and nothing waits once the load has ended")
    samples = []
    ends = time.monotonic() + REST_S
    while time.monotonic() < ends:
        samples += soak.look(service)
        time.sleep(1)
    return samples


def under_load(
    soak: Soak, service: LocalService, seconds: float, seed: str, clients: int
) -> list[Request]:
    """Load for so long, sampled and told. Gives its requests."""
    ends, shown = time.monotonic() + seconds, time.monotonic()
    with Load(service.url, service.token, seed, clients) as load:
        while (now := time.monotonic()) < ends:
            samples = soak.look(service)
            soak.samples += samples
            series = service.series(*WORK)
            used, _, waiting = (sum(values.values()) for values in series.values())
            soak.slots.append((now - soak.began, used, waiting))
            if now >= shown:
                shown += SHOWN_S
                engines = sum(one.rss for one in samples if one.process.startswith("engine"))
                print(
                    f"[{now - soak.began:6.0f} s] {len(load.requests):,} requests, engines "
                    f"{engines / MIB:,.0f} MiB, {used:.0f} slots used, {waiting:.0f} wait; "
                    f"{ends - now:,.0f} s to go",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(max(0.0, SAMPLE_S - (time.monotonic() - now)))
    return load.requests


def compare(first: Sequence[Sample], last: Sequence[Sample]) -> list[Row]:
    """Each process of the first rest at the last. A process that is gone is over its bound."""
    rows = []
    for name in dict.fromkeys(one.process for one in first):
        before = [one for one in first if one.process == name]
        after = [one for one in last if one.process == name]
        rss, fds, threads = (
            (_median(before, key), _median(after, key)) for key in ("rss", "fds", "threads")
        )
        noise = max(one.rss for one in before) - min(one.rss for one in before)
        over = [] if after else ["gone"]
        if rss[1] > rss[0] + max(rss[0] * RSS_SHARE, MORE_RSS) + noise:
            over.append("memory")
        if fds[1] > fds[0] + MORE_FDS:
            over.append("file descriptors")
        if threads[1] > threads[0] + MORE_THREADS:
            over.append("threads")
        rows.append(Row(name, rss, noise, fds, threads, over))
    return rows


def _median(samples: Sequence[Sample], key: str) -> float:
    return float(median([getattr(one, key) for one in samples] or [0]))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown."""
    yield "| process | MiB, first and last | noise | file descriptors | threads | grew |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        rss = f"{row.rss[0] / MIB:.1f}, {row.rss[1] / MIB:.1f}"
        yield (
            f"| {row.process} | {rss} | {row.rss_noise / MIB:.1f} "
            f"| {row.fds[0]:.0f}, {row.fds[1]:.0f} | {row.threads[0]:.0f}, {row.threads[1]:.0f} "
            f"| {', '.join(row.over) or 'no'} |"
        )


def plot(soak: Soak, path: Path) -> None:
    """Memory, file descriptors, threads and slots over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(9, 11), sharex=True, layout="constrained")
    names = sorted({one.process for one in soak.samples if one.process.split(" ")[0] in PLOTTED})
    for name in names:
        mine = [one for one in soak.samples if one.process == name]
        minutes = [one.at / 60 for one in mine]
        axes[0].plot(minutes, [one.rss / MIB for one in mine], label=name)
        axes[1].plot(minutes, [one.fds for one in mine])
        axes[2].plot(minutes, [one.threads for one in mine])
    minutes = [at / 60 for at, _, _ in soak.slots]
    axes[3].plot(minutes, [used for _, used, _ in soak.slots], label="slots used")
    axes[3].plot(minutes, [waiting for _, _, waiting in soak.slots], label="waiting")
    for axis, title in zip(
        axes, ("resident memory, MiB", "file descriptors", "threads", "requests"), strict=True
    ):
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(ncols=3, fontsize="small")
    axes[3].legend(fontsize="small")
    axes[3].set_xlabel("minutes")
    figure.savefig(path)
    pyplot.close(figure)


def main() -> int:
    """Run, compare, tell."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--clients", type=int, default=6, help="at work at once")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), help="default: any")
    parser.add_argument("--out", type=Path, default=Path("build/soak"), help="folder of the files")
    given = parser.parse_args()
    # As an exception: a service must not outlive what started it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds = 60 * given.minutes
    warm = min(_WARM * seconds, _WARM_S)
    print(f"seed {given.seed}, {given.minutes:g} minutes, {given.clients} clients", flush=True)
    with started() as service:
        soak = Soak()
        requests = under_load(soak, service, warm, f"{given.seed}/warm", given.clients)
        first = rest(soak, service)
        requests += under_load(soak, service, seconds - warm, f"{given.seed}/soak", given.clients)
        last = rest(soak, service)
    rows = compare(first, last)
    bad = lost(requests)
    print("\n".join(table(rows)))
    print(f"\n{len(requests):,} requests: {counts(requests)}")
    for one in bad[:20]:
        print(f"not as it should: {one.kind}: {label(one)}")
    given.out.mkdir(parents=True, exist_ok=True)
    plot(soak, given.out / "soak.svg")
    record = {
        "seed": given.seed,
        "minutes": given.minutes,
        "requests": len(requests),
        "failed": len(bad),
        "processes": [asdict(row) for row in rows],
        "samples": [asdict(one) for one in soak.samples],
        "slots": soak.slots,
    }
    (given.out / "soak.json").write_text(json.dumps(record), encoding="utf-8")
    print(f"written: {given.out / 'soak.svg'}, {given.out / 'soak.json'}")
    return int(bool(bad) or any(row.over for row in rows))


if __name__ == "__main__":
    sys.exit(main())
