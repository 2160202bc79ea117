"""`python -m tests.cluster up|down|check`: the cluster by hand."""

from __future__ import annotations

import argparse
import sys

from tests.cluster import components, daemons, images, machine
from tests.cluster.images import start


def main() -> int:
    """Do it."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "check"])
    command = parser.parse_args().command
    if command == "check":
        reasons = components.missing()
        print("\n".join(reasons), end="\n" if reasons else "")
        return int(bool(reasons))
    if command == "down":
        machine.down()
        return 0
    start()
    images.operator()
    print(images.application())
    print(f"export KUBECONFIG={daemons.KUBECONFIG} PATH={components.BIN}:$PATH")
    return 0


if __name__ == "__main__":
    sys.exit(main())
