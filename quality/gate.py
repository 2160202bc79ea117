"""The gate: run the runner, judge what it wrote, tell. `scripts/gate --help` says how."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from quality import FLOORS, HELDOUT, RUNS, SEARCHES, GateError, report
from quality.inputs import Floors, Rows, Text, bounds_of, read_floors, read_rows, read_texts
from quality.runs import Image, RunnerError, container, local, run
from quality.scores import criteria

_REPORT = Path("dist/gate.json")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as all errors here."""
        raise GateError(f"{message} (scripts/gate --help)")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/gate",
        description="Judge an image before it is pushed: its engine against generate(), its "
        "model's summaries of held-out texts against floors.",
        epilog="Exit status: 0 passed, 1 failed, 2 wrong use. A table is added to the file that "
        "GITHUB_STEP_SUMMARY names.",
    )
    parser.add_argument("image", nargs="?", help="in buildah's store, or oci:FOLDER")
    parser.add_argument("--local", action="store_true", help="no image: this environment")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="no run: judge an earlier one's")
    parser.add_argument("--model", help="default: the one in the image, else the demo model")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "int8"), help="what is served with"
    )
    parser.add_argument("--floors-of", metavar="NAME", help="whose floors; default: the model's")
    parser.add_argument("--floors", type=Path, default=FLOORS, metavar="FILE")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, metavar="FILE")
    parser.add_argument(
        "--report", type=Path, default=_REPORT, metavar="FILE", help=f"default: {_REPORT}"
    )
    parser.add_argument(
        "--measure", action="store_true", help="no verdict: print floors for this model"
    )
    arguments = parser.parse_args(argv)
    if (arguments.image is not None) + arguments.local + (arguments.rows is not None) != 1:
        parser.error("say one of IMAGE, --local and --rows FILE")
    if arguments.rows and (arguments.model or arguments.dtype):
        parser.error("--rows has been run already: no --model or --dtype")
    return arguments


def _progress(total: int, floors: Callable[[Rows], object]) -> Callable[[Rows], None]:
    """Says each run and search when it is done; finds out early whether there are floors."""
    began = time.monotonic()
    each = total // (len(RUNS) * len(SEARCHES))
    told = 0

    def see(rows: Rows) -> None:
        nonlocal told
        if not rows.dtypes:
            floors(rows)
        done = len(rows.summaries)
        if done // each > told:
            told = done // each
            run, search, _ = next(reversed(rows.summaries))
            seconds = time.monotonic() - began
            _tell(f"{done} of {total} summaries after {seconds:.0f} s: {run}, {search}")

    return see


def _rows(
    arguments: argparse.Namespace, texts: list[Text], floors: Callable[[Rows], object]
) -> tuple[Rows, Image | None]:
    """Summaries from an image, from here, or from an earlier run. The former two are kept."""
    if arguments.rows:
        rows = read_rows(arguments.rows)
        floors(rows)
        return rows, None
    options = [
        option
        for name in ("model", "dtype")
        if (value := getattr(arguments, name)) is not None
        for option in (f"--{name}", value)
    ]
    total = len(texts) * len(RUNS) * len(SEARCHES)
    see = _progress(total, floors)
    image = None
    if arguments.local:
        rows, raw = run(local(), options, texts, see)
    else:
        with container(arguments.image) as (image, python):
            _tell(f"{image.name} is {image.id[:12]}; {len(texts)} texts")
            rows, raw = run(python, options, texts, see)
    _write(arguments.report.with_suffix(".rows.jsonl"), raw)
    return rows, image


def _gate(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    texts = read_texts(arguments.heldout)
    limits: Floors = read_floors(arguments.floors)
    # An earlier verdict must not be taken for this one's.
    arguments.report.unlink(missing_ok=True)

    def name(rows: Rows) -> str:
        return str(arguments.floors_of or rows.model["model"])

    def early(rows: Rows) -> None:
        if not arguments.measure:
            bounds_of(limits, name(rows), arguments.floors)

    try:
        rows, image = _rows(arguments, texts, early)
    except RunnerError as error:
        _write(arguments.report, json.dumps({"verdict": "failed", "error": str(error)}) + "\n")
        _summary(f"## Quality gate: failed\n\nThe runner: {error}\n")
        _fail(f"runner: {error}")
        return 1
    if arguments.measure:
        print(report.measured(rows, texts, name(rows)))
        return 0
    bounds = bounds_of(limits, name(rows), arguments.floors)
    found = criteria(rows, texts, bounds, limits.parity)
    told = report.build(rows, texts, arguments.heldout, image, name(rows), bounds, found)
    _write(arguments.report, json.dumps(told, indent=2) + "\n")
    _summary(report.markdown(told, found))
    print(report.plain(found))
    for line in report.prose_lines(told):
        print(f"  prose, does not count: {line}")
    if not told["model"]["weights"].startswith(bounds.weights):
        _tell(f"floors were measured with weights {bounds.weights}, these are others")
    failed = [one for one in found if not one.passed]
    for one in failed:
        _fail(report.failure(one))
    _tell(f"{told['verdict']}, {told['model']['name']}; all figures are in {arguments.report}")
    return 1 if failed else 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _summary(text: str) -> None:
    if target := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(target, "a", encoding="utf-8") as file:
            file.write(text)


def _tell(text: str) -> None:
    print(f"gate: {text}", file=sys.stderr, flush=True)


def _fail(text: str) -> None:
    # On GitHub it is an annotation of the run, too.
    prefix = "::error::" if os.environ.get("GITHUB_ACTIONS") else ""
    print(f"{prefix}gate: failed: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Run and exit."""
    # So that the container is removed when CI stops the job.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(_gate(sys.argv[1:]))
    except GateError as error:
        _tell(str(error))
        sys.exit(2)
    except OSError as error:
        _tell(f"{error.filename}: {error.strerror}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
