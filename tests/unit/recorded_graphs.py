"""CUDA graphs without a GPU: what a graph freezes is frozen, what it reads anew is read anew.

A graph launches the same kernels with the same numbers on the same addresses, whatever Python has
done to its variables since. Here operations are recorded with their tensors, and a replay runs them
again into the tensors that they returned then. Recorded tensors stay alive: what a graph would read
of memory that has been freed does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.operations: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []

    def replay(self) -> None:
        """Run what has been recorded."""
        for operation, args, kwargs, returned in self.operations:
            found = [one for one in tree_leaves(operation(*args, **kwargs)) if torch.is_tensor(one)]
            for old, new in zip(returned, found, strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        returned = [one for one in tree_leaves(found) if torch.is_tensor(one)]
        self._graph.operations.append((func, args, kwargs or {}, returned))
        return found


class _Stream:
    def wait_stream(self, stream: Any) -> None:
        """Nothing runs beside anything here."""


@contextmanager
def _record(graph: RecordedGraph, **_: Any) -> Iterator[None]:
    with _Recorder(graph):
        yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what `StepGraphs` uses of `torch.cuda`."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", _record)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
