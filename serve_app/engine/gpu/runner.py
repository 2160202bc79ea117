"""The running batch in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.faults import let_go, out_of_memory
from serve_app.engine.gpu.graphs import StepGraphs, forward
from serve_app.engine.gpu.memory import plan_rows
from serve_app.engine.gpu.model import T5
from serve_app.engine.gpu.search import beam_step, greedy_step
from serve_app.engine.gpu.slots import Group
from serve_app.engine.queue import Entry
from serve_app.engine.runner import Advance, Plan
from serve_app.engine.thread import padded
from serve_app.engine.weights import WeightSource, read_shape

_SIMILAR = 0.7  # documents of one microbatch have at least this share of its longest


class TorchRunner:
    """See `serve_app.engine.runner.Runner`."""

    # A step hardly takes longer for more rows on a GPU.
    steps_some = False

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self.shape = read_shape(checkpoint.config)
        if plan.device.startswith("cuda:"):
            torch.cuda.set_device(plan.device)  # streams and graphs are the current device's
        weights = WeightSource(checkpoint, self.shape, plan.device, getattr(torch, plan.dtype))
        self._model = T5(weights, self.shape)
        self._constraints = checkpoint.constraints
        self._plan = plan
        self._groups: dict[int, Group] = {}  # by number of beams
        self.most_rows = plan.rows or 64
        self._graphs: StepGraphs | None = None
        self._rounded = plan.rounded
        self._failed: Exception | None = None  # on a step of which a part had been done
        self._similar = _SIMILAR
        if self._model.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._model.device)
            self.most_rows = plan_rows(self.shape, plan, free, self._model.dtype.itemsize)
            self._graphs, self._rounded = StepGraphs(self._model), True
            # Encoding takes as long as its launches do, whatever they are given.
            self._similar = 0.0

    @property
    def entries(self) -> list[Entry]:
        """See `Runner.entries`."""
        return [entry for group in self._groups.values() for entry in group.entries]

    @property
    def rows(self) -> int:
        """See `Runner.rows`."""
        return sum(group.rows for group in self._groups.values())

    @property
    def weight_bytes(self) -> int:
        """See `Runner.weight_bytes`."""
        return self._model.weight_bytes

    @property
    def cache_bytes(self) -> int:
        """See `Runner.cache_bytes`."""
        return sum(group.cache_bytes for group in self._groups.values())

    def admit(self, entries: Sequence[Entry]) -> None:
        """See `Runner.admit`."""
        encoded = [(batch, self._encode(batch)) for batch in _microbatches(entries, self._similar)]
        try:
            for batch, (keys, values) in encoded:
                for beams in {entry.request.settings.num_beams for entry in batch}:
                    mine = [i for i, e in enumerate(batch) if e.request.settings.num_beams == beams]
                    alone = len(mine) == len(batch)
                    self._group(beams).admit(
                        [batch[i] for i in mine],
                        [batch[i].tokens for i in mine],
                        (keys, values) if alone else (keys[:, mine], values[:, mine]),
                    )
        except Exception:
            self.leave(entries)
            raise

    def leave(self, entries: Sequence[Entry]) -> None:
        """See `Runner.leave`."""
        gone = set(map(id, entries))
        for group in self._groups.values():
            group.leave([slot for slot, entry in enumerate(group.entries) if id(entry) in gone])

    def step(self, only: Sequence[Entry] | None = None) -> list[Advance]:
        """See `Runner.step`."""
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        advances: list[Advance] = []
        for group in self._groups.values():
            try:
                advances.extend(self._step(group))
            except Exception as error:
                if not advances:
                    raise
                # What other groups have done cannot be done again: it counts, and the error next.
                self._failed = error
                break
        return advances

    def _step(self, group: Group) -> list[Advance]:
        if not len(group):
            return []
        view = group.view(rounded=self._rounded)
        if self._graphs is not None:
            logits = self._graphs(group, view)
        else:
            logits = forward(self._model, group, view)
        return self._choose(group, logits[: group.rows])

    def _choose(self, group: Group, logits: Tensor) -> list[Advance]:
        eos_id = self.shape.eos_id
        if group.beams == 1:
            chosen, done = greedy_step(group, logits, eos_id, self._constraints)
            # One copy from the device, not two.
            news, flags = torch.stack((chosen, done.to(chosen.dtype))).tolist()
        else:
            flags = beam_step(group, logits, eos_id, self._constraints).tolist()
            news = [None] * len(group)
        over = [slot for slot, flag in enumerate(flags) if flag]
        outputs = dict(zip(over, group.outputs(over), strict=True))
        advances = []
        for slot, (entry, new) in enumerate(zip(group.entries, news, strict=True)):
            streamed = [new] if entry.request.stream and new is not None else []
            advances.append(Advance(entry, 1, streamed, outputs.get(slot)))
        return advances

    def _group(self, beams: int) -> Group:
        if beams not in self._groups:
            try:
                self._groups[beams] = self._new_group(beams)
            except Exception as error:
                empty = [b for b, group in self._groups.items() if not len(group)]
                if not (empty and out_of_memory(error)):
                    raise
                # Rows are planned for all of them together, but each group keeps room for all.
                let_go(error)
                for other in empty:
                    self._forget(other)
                self._groups[beams] = self._new_group(beams)
        return self._groups[beams]

    def _new_group(self, beams: int) -> Group:
        group = Group(self._model, beams)
        if self._graphs is not None:
            # All room at once: graphs are of tensors where they lie.
            slots = max(self.most_rows // beams, 1)
            group.reserve(slots, self._plan.steps, self._plan.source)
            self._graphs.reserve(slots * beams)
        return group

    def _forget(self, beams: int) -> None:
        del self._groups[beams]
        if self._graphs is not None:
            self._graphs.forget(beams)

    def _encode(self, batch: list[Entry]) -> tuple[Tensor, Tensor]:
        ids, mask = padded(batch, self.shape.pad_id, self._model.device)
        return self._model.encode(ids, mask)


def _microbatches(entries: Sequence[Entry], similar: float) -> Iterator[list[Entry]]:
    """Documents of similar length together, so that little is encoded that is padding."""
    batch: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: -entry.tokens):
        if batch and entry.tokens < similar * batch[0].tokens:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch
