"""Decode steps as CUDA graphs.

A step of a small model is some two hundred kernels of a few microseconds each: launched one by
one they take longer than they run. Captured once for a group and a view of it, they are launched as
one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve_app.engine.gpu.model import T5
from serve_app.engine.gpu.slots import Group, View


def forward(model: T5, group: Group, view: View) -> Tensor:
    """Logits of a group's rows, (slots * beams, vocabulary), float32."""
    return _decode(model, group, view).float()


def _decode(model: T5, group: Group, view: View) -> Tensor:
    return model.decode(group.begin(view), group.attend, group.cross)


class StepGraphs:
    """`forward`, replayed. Graphs share memory pool and output: never do two run at once."""

    def __init__(self, model: T5) -> None:
        self._model = model
        self._graphs: dict[tuple[int, int, View], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # One for all captures: a stream has workspaces of its own, and memory that no other uses.
        self._stream = torch.cuda.Stream()
        # Outside of the pool, in which each graph would keep logits of its own.
        self._logits = torch.empty(0, model.shape.vocabulary, device=model.device)

    def __call__(self, group: Group, view: View) -> Tensor:
        """See `forward`. The result is overwritten by the next call."""
        rows = view.slots * group.beams
        key = (group.beams, group.moved, view)
        if key not in self._graphs:
            # Graphs of tensors that have been moved since will not be asked for again.
            self._graphs = {
                k: v for k, v in self._graphs.items() if k[0] != group.beams or k[1] == group.moved
            }
            self.reserve(rows)
            self._graphs[key] = self._capture(group, view, self._logits[:rows])
        self._graphs[key].replay()
        return self._logits[:rows]

    def reserve(self, rows: int) -> None:
        """Make room for the logits of so many rows."""
        if rows > len(self._logits):
            self._graphs.clear()  # they write into the old one
            self._logits = torch.empty(rows, self._logits.shape[1], device=self._logits.device)

    def forget(self, beams: int) -> None:
        """Drop the graphs of a group that is gone."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] != beams}

    def _capture(self, group: Group, view: View, logits: Tensor) -> torch.cuda.CUDAGraph:
        if not self._graphs:
            # A pool whose last graph is gone takes no other.
            self._pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            # A stream around it all, because one whose capture fails would stay the current one.
            with torch.cuda.stream(self._stream):
                # Once in eager mode: libraries set themselves up on first use. It writes what the
                # replay will write again.
                logits.copy_(_decode(self._model, group, view))
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    logits.copy_(_decode(self._model, group, view))
        finally:
            # Out of memory, too: what had been launched by then writes into slots.
            current.wait_stream(self._stream)
        return graph
