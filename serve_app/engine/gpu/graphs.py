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
    return model.decode(group.begin(view), group.attend, group.cross)


class StepGraphs:
    """`forward`, replayed. Graphs share one memory pool: never do two run at once."""

    def __init__(self, model: T5) -> None:
        self._model = model
        self._graphs: dict[tuple[int, int, View], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, group: Group, view: View) -> Tensor:
        """See `forward`. The result is overwritten by the next call."""
        key = (group.beams, group.moved, view)
        if key not in self._graphs:
            # Graphs of tensors that have been moved since will not be asked for again.
            self._graphs = {
                k: v for k, v in self._graphs.items() if k[0] != group.beams or k[1] == group.moved
            }
            self._graphs[key] = self._capture(group, view)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _capture(self, group: Group, view: View) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Once in eager mode, on a stream of its own: libraries set themselves up on first use. It
        # writes what the replay will write again.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(self._model, group, view)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = forward(self._model, group, view)
        return graph, logits
