"""The running batch in torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.faults import let_go, out_of_memory
from serve_app.engine.gpu import attention
from serve_app.engine.gpu.graphs import StepGraphs, step
from serve_app.engine.gpu.memory import plan_rows
from serve_app.engine.gpu.model import T5
from serve_app.engine.gpu.search import Search
from serve_app.engine.gpu.slots import Group, Seat, on_device
from serve_app.engine.queue import Entry
from serve_app.engine.runner import Advance, Plan
from serve_app.engine.weights import WeightSource, read_shape

_SIMILAR = 0.7  # documents of one microbatch have at least this share of its longest
_GPU_SHARE = 1 / 16  # see `Runner.admit_share`; encoding few documents takes a GPU as long as many
_ALIGNED = 16  # fused attention wants its mask's rows to begin at multiples of so many positions


@dataclass(slots=True)
class _Flight:
    """A step of a group that has been launched. `result`: see `Search.choose`, on the host once
    `arrived` has come about; `slots` are those of `seats`."""

    group: Group
    slots: list[int]
    seats: list[Seat]
    result: Tensor
    arrived: torch.cuda.Event | None


class TorchRunner:
    """See `serve_app.engine.runner.Runner`.

    With graphs, a greedy step is launched before the host has seen what the one before has chosen,
    so that neither waits for the other: `step` tells of the step that the last call has launched. A
    document that has ended is in one step too many. Outputs of beam search lie on the device and
    would wait for that step, so there is none in advance.
    """

    # A step hardly takes longer for more rows on a GPU.
    steps_some = False

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self.shape = read_shape(checkpoint.config)
        if plan.device.startswith("cuda:"):
            torch.cuda.set_device(plan.device)  # streams and graphs are the current device's
        weights = WeightSource(checkpoint, self.shape, plan.device, getattr(torch, plan.dtype))
        self._model = T5(weights, self.shape)
        search = Search(self.shape.eos_id, checkpoint.constraints, self._model.device)
        self._run = partial(step, self._model, search)
        self._plan = plan
        self._groups: dict[int, Group] = {}  # by number of beams
        self.most_rows = plan.rows or 64
        self._graphs: StepGraphs | None = None
        self._rounded = plan.rounded
        self._attention: attention.StepAttention | None = None
        self._failed: Exception | None = None  # on a step of which a part had been done
        self._flights: list[_Flight] = []  # launched in advance
        self._similar, self.admit_share = _SIMILAR, 0.0
        if self._model.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._model.device)
            self.most_rows = plan_rows(self.shape, plan, free, self._model.dtype.itemsize)
            self._graphs, self._rounded = StepGraphs(self._run), True
            self._attention = attention.load(self.shape, self._model.dtype)
            # Encoding takes as long as its launches do, whatever they are given.
            self._similar, self.admit_share = 0.0, _GPU_SHARE

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
        # Before anything is encoded: that would lie where a group that makes way has been, and a
        # new one wants much of it in one piece.
        for beams in {entry.request.settings.num_beams for entry in entries}:
            self._group(beams)
        try:
            for batch in _microbatches(entries, self._similar):
                encoded = self._encode(batch)
                for beams in {entry.request.settings.num_beams for entry in batch}:
                    mine = [i for i, e in enumerate(batch) if e.request.settings.num_beams == beams]
                    alone = len(mine) == len(batch)
                    self._group(beams).admit(
                        [batch[i] for i in mine],
                        [batch[i].tokens for i in mine],
                        encoded if alone else encoded[:, :, mine],
                    )
        except Exception:
            self.leave(entries)
            raise

    def leave(self, entries: Sequence[Entry]) -> None:
        """See `Runner.leave`."""
        gone = set(map(id, entries))
        for group in self._groups.values():
            group.leave(
                [slot for slot, seat in enumerate(group.seats) if seat and id(seat.entry) in gone]
            )

    def step(self, only: Sequence[Entry] | None = None) -> list[Advance]:
        """See `Runner.step`."""
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        landing, self._flights = self._flights, []
        for group in self._groups.values():
            if not len(group):
                continue
            try:
                flight = self._launch(group)
            except Exception as error:
                failed = error
                break
            ahead = self._graphs is not None and group.beams == 1
            (self._flights if ahead else landing).append(flight)
        advances = [advance for flight in landing for advance in self._land(flight)]
        if failed is not None:
            if not advances:
                raise failed
            # What has been done cannot be done again: it counts, and the error next time.
            self._failed = failed
        return advances

    def _launch(self, group: Group) -> _Flight:
        """Begin a step of a group."""
        view = group.view()
        result = (self._graphs or self._run)(group, view)
        group.launched()
        taken = [(slot, seat) for slot, seat in enumerate(group.seats) if seat is not None]
        slots, seats = [slot for slot, _ in taken], [seat for _, seat in taken]
        if not result.is_cuda:  # a copy, for the next replay writes to the same place
            return _Flight(group, slots, seats, result.clone(), None)
        arrived = torch.cuda.Event()
        told = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        told.copy_(result, non_blocking=True)
        arrived.record()
        return _Flight(group, slots, seats, told, arrived)

    def _land(self, flight: _Flight) -> list[Advance]:
        """What a step did, for those of its documents that are still there."""
        group = flight.group
        here = set(map(id, group.seats))
        if here.isdisjoint(map(id, flight.seats)):
            return []
        if flight.arrived is not None:
            flight.arrived.synchronize()
        if group.beams > 1:
            return self._land_beams(flight)
        advances = []
        chosen, done = flight.result.tolist()
        for slot, seat in zip(flight.slots, flight.seats, strict=True):
            if id(seat) in here:
                new = chosen[slot]
                seat.tokens.append(new)
                streamed = (new,) if seat.entry.request.stream else ()
                output = seat.tokens if done[slot] else None
                advances.append(Advance(seat.entry, 1, streamed, output))
        return advances

    def _land_beams(self, flight: _Flight) -> list[Advance]:
        done = flight.result.tolist()
        over = [slot for slot in flight.slots if done[slot]]
        outputs = dict(zip(over, flight.group.outputs(over), strict=True))
        return [
            Advance(seat.entry, 1, (), outputs.get(slot))
            for slot, seat in zip(flight.slots, flight.seats, strict=True)
        ]

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
        group = Group(self._model, beams, rounded=self._rounded, attention=self._attention)
        if self._graphs is not None:
            # All room at once: graphs are of tensors where they lie.
            slots = max(self.most_rows // beams, 1)
            group.reserve(slots, self._plan.steps + 1, self._plan.source)
        return group

    def _forget(self, beams: int) -> None:
        gone = self._groups.pop(beams)
        self._flights = [flight for flight in self._flights if flight.group is not gone]
        if self._graphs is not None:
            self._graphs.forget(beams)

    def _encode(self, batch: list[Entry]) -> Tensor:
        width = -(-max(entry.tokens for entry in batch) // _ALIGNED) * _ALIGNED
        flat = array("q")
        for entry in batch:
            flat.extend(entry.request.input_ids)
            flat.extend([self.shape.pad_id] * (width - entry.tokens))
        flat.extend(entry.tokens for entry in batch)
        host = torch.frombuffer(flat, dtype=torch.int64)
        both = on_device(host, self._model.device)
        ids, lengths = both[: -len(batch)].view(len(batch), width), both[-len(batch) :]
        mask = torch.arange(width, device=self._model.device) < lengths[:, None]
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
