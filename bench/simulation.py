"""How fast scaling is simulated: `python -m bench.simulation [--day]`.

Virtual over real seconds, of a load on replicas that the policy scales. The first run compiles, and
does not count. Processor seconds stand beside the wall's, which others of the machine lengthen.
"""

from __future__ import annotations

import argparse
import time

from serve_app.tuning.arrivals import Load
from serve_app.tuning.loads import drawn
from serve_app.tuning.model import Platform, Scaling, ServiceModel
from serve_app.tuning.outcome import figures
from serve_app.tuning.simulate import Simulation
from serve_app.tuning.sizes import Mix, Sizes


def timed(kind: str, rate: float, seconds: float, replicas: int, target: float) -> None:
    """Simulate once and print."""
    model = ServiceModel()
    load = Load(kind, rate, seconds)  # type: ignore[arg-type]
    sizes = Sizes.parse("lognormal:180:0.6"), Sizes.parse("lognormal:60:0.5"), Mix.parse("1")
    blocks = drawn(load, *sizes, model.max_input_tokens, 1)
    first = max(replicas // 2, 1)
    scaling = Scaling(min_replicas=first, max_replicas=replicas, target_ongoing_requests=target)
    wall, cpu = time.perf_counter(), time.process_time()
    found = figures(Simulation(blocks, seconds, model, scaling, Platform()).run())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"{kind}, {rate:g} requests/s, {replicas} replicas, {seconds:g} s: {wall:.1f} s, "
        f"{seconds / wall:,.0f}x; processor {cpu:.1f} s, {seconds / cpu:,.0f}x; "
        f"{found['requests']:,} requests, {found['replicas_mean']:.1f} replicas on average, "
        f"p95 {found['latency_p95_s']:.3f} s",
        flush=True,
    )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--day", action="store_true", help="1,000 replicas for a day, too")
    arguments = parser.parse_args()
    timed("poisson", 5, 600, 4, 8)
    timed("poisson", 50, 86_400, 10, 2)
    timed("poisson", 10_000, 60, 1_000, 2)
    if arguments.day:
        timed("diurnal", 10_000, 86_400, 1_000, 2)


if __name__ == "__main__":
    main()
