"""Each engine in a process of its own.

Every thread that computes gets an OpenMP team, and with more threads in teams than there are CPUs
libgomp puts waiting threads to sleep: engines in one process would slow each other down even while
only one of them works.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class RefusedError(Exception):
    """The engine could not be opened: this machine or this engine does not have that type."""


class Worker:
    """An object made and used in a fresh process; method calls block.

    Raises:
        RefusedError: making it raised.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            error = self._pipe.recv()[1]
        except EOFError:
            error = f"its process ended with code {self._exit_code()}"
        if error is not None:
            self._process.join()
            raise RefusedError(error)

    def call(self, method: str, *arguments: Any) -> Any:
        """The method's result; what it raises comes back as `RuntimeError`."""
        self._pipe.send((method, arguments))
        try:
            result, error = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process ended with code {self._exit_code()}") from None
        if error is not None:
            raise RuntimeError(error)
        return result

    def close(self) -> None:
        """End the process."""
        self._pipe.close()  # its receive ends with EOFError
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()

    def _exit_code(self) -> int | None:
        self._process.join(timeout=30)
        return self._process.exitcode


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        made = make(*arguments)
    except Exception as error:
        traceback.print_exc()
        pipe.send((None, _line(error)))
        return
    pipe.send((None, None))
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((getattr(made, method)(*arguments), None))
        except Exception as error:
            traceback.print_exc()
            pipe.send((None, _line(error)))
    if hasattr(made, "close"):
        made.close()


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
