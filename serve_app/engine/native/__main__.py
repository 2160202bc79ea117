"""`python -m serve_app.engine.native`: build the kernels for every instruction set."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve_app.engine.native import HERE, VARIANTS, library

# No -ffast-math: softmax and masks rely on infinities. FMA contraction is wanted.
FLAGS = [
    "-std=c++20", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast",
    "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi",
]  # fmt: skip


def build(variant: str, compiler: str) -> Path:
    """Compile one variant. Raises `subprocess.CalledProcessError`."""
    path = library(variant)
    if not path.exists():
        fresh = path.with_suffix(f".{os.getpid()}")
        files = [str(file) for file in sorted(HERE.glob("*.cpp"))]
        command = [compiler, *FLAGS, *VARIANTS[variant], *files, "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        fresh.replace(path)
    return path


def main() -> int:
    """Build what this architecture can run; remove builds of other sources."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        print("no C++ compiler found: install g++, or set CXX", file=sys.stderr)
        return 2
    intel = platform.machine() in ("x86_64", "AMD64")
    variants = [name for name in VARIANTS if intel or name == "generic"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            built = set(pool.map(lambda variant: build(variant, compiler), variants))
        except subprocess.CalledProcessError as error:
            print(f"{compiler} failed:\n{error.stderr}", file=sys.stderr)
            return 1
    for path in HERE.glob("*.so"):
        if path not in built:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
