"""The soak's comparison: what is growth and what is noise."""

from __future__ import annotations

from bench.soak import Sample, compare

MIB = 1 << 20


def rest(process: str, rss_mib: list[float], fds: int = 40, threads: int = 12) -> list[Sample]:
    return [Sample(float(at), process, int(r * MIB), fds, threads) for at, r in enumerate(rss_mib)]


def test_what_grew_is_told() -> None:
    first = [
        *rest("engine 1", [100, 104, 100]),  # 4 MiB of noise
        *rest("api 2", [100, 100, 100]),
        *rest("proxy 3", [100, 100, 100]),
        *rest("gcs 4", [100, 100, 100]),
        *rest("raylet 5", [100, 100, 100]),
    ]
    last = [
        *rest("engine 1", [113, 113, 113]),
        *rest("api 2", [111, 111, 111]),
        *rest("proxy 3", [60, 100, 90], fds=43),
        *rest("gcs 4", [100, 100, 100], threads=15),
    ]
    told = {row.process: row.over for row in compare(first, last)}
    assert told == {
        "engine 1": [],
        "api 2": ["memory"],
        "proxy 3": ["file descriptors"],
        "gcs 4": ["threads"],
        "raylet 5": ["gone"],
    }
