"""Decode steps as CUDA graphs.

A step of a small model is some two hundred kernels of a few microseconds each: launched one by
one they take longer than they run. Captured once for a group, a view of it and what its documents
ask of search, they are launched as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from serve_app.engine.gpu.model import T5
from serve_app.engine.gpu.search import Search
from serve_app.engine.gpu.slots import Group, Rules, View

# Each is some megabytes, and clients may ask for n-gram sizes as they like.
_MOST_GRAPHS = 256


def forward(model: T5, group: Group, view: View) -> Tensor:
    """Logits of a group's rows, (slots * beams, vocabulary), float32."""
    return model.decode(group.begin(view), group.attend, group.cross).float()


def step(model: T5, search: Search, group: Group, view: View) -> Tensor:
    """A step of a group: one more token for each document; returns what `Search.choose` does."""
    return search.choose(group, view, forward(model, group, view))


class _Key(NamedTuple):
    beams: int
    moved: int
    view: View
    rules: Rules


class StepGraphs:
    """Calls of `run` with a group and a view of it, replayed. Beside what it returns it may change
    the group's tensors. Graphs share a memory pool: never do two run at once.
    """

    def __init__(self, run: Callable[[Group, View], Tensor]) -> None:
        self._run = run
        self._graphs: dict[_Key, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # the oldest use first
        self._pool = torch.cuda.graph_pool_handle()
        # One for all captures: a stream has workspaces of its own, and memory that no other uses.
        self._stream = torch.cuda.Stream()

    def __call__(self, group: Group, view: View) -> Tensor:
        """See `run`. The result is overwritten by the graph's next replay."""
        key = _Key(group.beams, group.moved, view, group.rules)
        found = self._graphs.pop(key, None)
        if found is None:
            current = torch.cuda.current_stream()
            current.synchronize()  # a graph that goes away may be under way
            # Graphs of tensors that have been moved since will not be asked for again.
            self._graphs = {
                k: v
                for k, v in self._graphs.items()
                if k.beams != group.beams or k.moved == group.moved
            }
            if len(self._graphs) == _MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            found = self._capture(group, view, current)
        self._graphs[key] = found
        graph, result = found
        graph.replay()
        return result

    def forget(self, beams: int) -> None:
        """Drop the graphs of a group that is gone."""
        torch.cuda.current_stream().synchronize()
        self._graphs = {key: graph for key, graph in self._graphs.items() if key.beams != beams}

    def _capture(
        self, group: Group, view: View, current: torch.cuda.Stream
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if not self._graphs:
            # A pool whose last graph is gone takes no other.
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        before = group.state.rows[: view.slots].clone()
        try:
            # A stream around it all, because one whose capture fails would stay the current one.
            with torch.cuda.stream(self._stream):
                # Once in eager mode: libraries set themselves up on first use. The caches that it
                # writes the replay will write again.
                self._run(group, view)
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    result = self._run(group, view)
        finally:
            # Out of memory, too: what had been launched by then writes into slots.
            current.wait_stream(self._stream)
            group.state.rows[: view.slots] = before
        return graph, result
