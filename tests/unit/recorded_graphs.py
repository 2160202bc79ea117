"""CUDA graphs without a GPU: what a graph freezes is frozen, what it reads anew is read anew.

A graph launches the same kernels with the same numbers on the same addresses, whatever Python has
done to its variables since. Here operations are recorded with their tensors, and a replay runs them
again into the tensors that they returned then. What a capture would refuse, because the host waits
for the device or brings it something, is refused. Recorded tensors stay alive: what a graph would
read of memory that has been freed does not show.
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

aten = torch.ops.aten
_REFUSED = {
    # In inference mode operations come as they are called, so their parts are not needed here.
    aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero,
    aten.masked_select, aten.lift_fresh,  # the last one is `torch.tensor`
}  # fmt: skip


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
        masks = func.overloadpacket in {aten.index, aten.index_put, aten.index_put_} and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func.overloadpacket in _REFUSED or masks:
            raise RuntimeError(f"{func}: not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        returned = [one for one in tree_leaves(found) if torch.is_tensor(one)]
        self._graph.operations.append((func, args, kwargs or {}, returned))
        return found


class _Stream:
    def wait_stream(self, stream: Any) -> None:
        """Nothing runs beside anything here."""

    def synchronize(self) -> None:
        """Nor is anything left to run."""


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
