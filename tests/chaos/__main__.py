"""`python -m tests.chaos`: rounds of faults against a real service on this machine."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time

from tests.chaos.faults import BY_NAME
from tests.chaos.rounds import FAULT_S, HEAD, Outcome, deal, play

_START_S = 60.0  # of a service


def main() -> int:
    """Play the rounds, print a table, and how to play a round again that broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), help="default: any")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", type=int, metavar="ROUND", help="this round of the seed's alone")
    parser.add_argument(
        "--faults", nargs="+", choices=list(BY_NAME), help="these in one round, in place of dealt"
    )
    parser.add_argument("--minutes", type=float, default=20, help="begin nothing that ends later")
    given = parser.parse_args()
    # As an exception: a service must not outlive what started it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ends = time.monotonic() + 60 * given.minutes
    dealt = [given.faults] if given.faults else deal(given.seed, given.rounds)
    print(f"seed {given.seed}", flush=True)
    outcomes: list[Outcome] = []
    for number, names in enumerate(dealt, start=1):
        if given.only not in (None, number):
            continue
        if time.monotonic() + _START_S + FAULT_S > ends:
            print(f"round {number} and later: no time left of {given.minutes:g} minutes")
            break
        outcomes += play(given.seed, number, names, lambda line: print(line, flush=True), ends)
    print(f"\n{HEAD}")
    print("\n".join(one.row() for one in outcomes))
    broken = sorted({one.round for one in outcomes if one.broken})
    for number in broken:
        replay = f"--faults {' '.join(map(repr, given.faults))}" if given.faults else ""
        print(f"again: python -m tests.chaos --seed {given.seed} {replay or f'--only {number}'}")
    return int(bool(broken) or not outcomes)


if __name__ == "__main__":
    sys.exit(main())
