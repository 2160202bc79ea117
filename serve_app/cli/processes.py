"""Signals and child processes of `t5-serve run`: stop on the first, leave nothing behind."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_ENDING_S = 5.0
_TERMINATED_S = 3.0


class Signals:
    """SIGINT and SIGTERM as `KeyboardInterrupt`: one to stop, a second to stop without grace."""

    def __init__(self) -> None:
        self._seen = 0
        self._ending = False

    def install(self) -> None:
        """Take both signals over. Again after `ray.init`, which sets a SIGTERM handler."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @contextmanager
    def grace(self) -> Iterator[None]:
        """Around a graceful stop: a second signal ends it early; later ones are ignored."""
        try:
            yield
        except KeyboardInterrupt:
            pass
        finally:
            self._ending = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # What ends the leftover processes must not be cut short: it takes seconds at most.
        self._seen += 1
        if not self._ending and self._seen <= 2:
            raise KeyboardInterrupt


@contextmanager
def no_process_left(signals: Signals, stop: Callable[[], None]) -> Iterator[None]:
    """Around everything that starts processes: `stop` them in the end, then end what is left."""
    adopt_orphans()
    try:
        yield
    finally:
        signals.install()  # `ray.init` may have been interrupted with its own handler in place
        started: set[psutil.Process] = set()
        try:
            with signals.grace():
                started = children()
                stop()
        finally:
            end({*started, *children()})


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies.

    Ray's worker processes are its raylet's children: if that crashes they would go to init, and
    nobody would know any more whose they are.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[psutil.Process]:
    """All descendants of this process."""
    return set(psutil.Process().children(recursive=True))


def end(processes: set[psutil.Process]) -> None:
    """Wait for processes to end, then tell them to, then kill them. Their own children too."""
    _, left = psutil.wait_procs(processes, timeout=_ENDING_S)
    for process in left:
        with suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(left, timeout=_TERMINATED_S)
    # What they started meanwhile has been adopted by this process.
    left = [process for process in {*left, *children()} if process.is_running()]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=_TERMINATED_S)
