"""The running batch on a CPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence

import torch

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.cpu.linear import Precision
from serve_app.engine.cpu.memory import give_back
from serve_app.engine.cpu.model import CpuT5, StepRows
from serve_app.engine.cpu.state import State
from serve_app.engine.queue import Entry
from serve_app.engine.runner import Advance, Plan
from serve_app.engine.speculation import LONGEST_RUN, MOST_DRAFTS, Draft, Speculation
from serve_app.engine.weights import WeightSource, read_shape

_TOGETHER = 1_024  # tokens encoded at once: more would leave the second-level cache
_DRAFT_ROWS = 64  # rows of a step that drafts may take, at most


class _Rows(ctypes.Structure):
    """`Rows` of native/search.h."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("tokens", "lanes", "positions", "firsts", "counts")
    )


class CpuRunner:
    """See `serve_app.engine.runner.Runner`."""

    steps_some = True
    admit_share = 0.0

    def __init__(self, checkpoint: Checkpoint, plan: Plan, kernels: ctypes.PyDLL) -> None:
        self._kernels = kernels
        self.shape = read_shape(checkpoint.config)
        precision = Precision(plan.dtype)
        weights = WeightSource(checkpoint, self.shape)
        self._model = CpuT5(weights, self.shape, precision, kernels)
        give_back()
        self.most_rows = plan.rows or 64
        self._state = State(
            self.shape, checkpoint.constraints, precision,
            lanes=self.most_rows, steps=plan.steps, source=plan.source,
        )  # fmt: skip
        self._speculation = Speculation() if plan.speculation else None
        self.entries: list[Entry] = []
        self._slots: list[int] = []
        self._laid: dict[tuple[int, ...], _Laid] = {}  # by slots
        self._run = ctypes.c_int32()

    @property
    def rows(self) -> int:
        """See `Runner.rows`."""
        return self._state.lane_count - len(self._state.free_lanes)

    @property
    def weight_bytes(self) -> int:
        """See `Runner.weight_bytes`."""
        return self._model.weight_bytes

    @property
    def cache_bytes(self) -> int:
        """See `Runner.cache_bytes`."""
        return self._state.cache_bytes

    def admit(self, entries: Sequence[Entry]) -> None:
        """See `Runner.admit`."""
        slots: list[int] = []
        try:
            slots.extend(self._state.admit(entry.request) for entry in entries)
            for start, end in _together(entries):
                inputs = [entry.request.input_ids for entry in entries[start:end]]
                self._model.encode(inputs, self._state, slots[start:end])
        except Exception:
            for slot in slots:
                self._state.release(slot)
            raise
        self.entries.extend(entries)
        self._slots.extend(slots)
        self._laid.clear()

    def leave(self, entries: Sequence[Entry]) -> None:
        """See `Runner.leave`."""
        for entry in entries:
            index = self.entries.index(entry)
            self._state.release(self._slots[index])
            del self.entries[index], self._slots[index]
        self._laid.clear()
        # Always on: a leaked slot would starve the service without a word.
        self._state.check(self._slots)

    def step(self, only: Sequence[Entry] | None = None) -> list[Advance]:
        """See `Runner.step`."""
        laid, state = self._lay_out(only), self._state
        rows = laid.rows
        began = time.perf_counter()
        drafts = self._draft(laid)
        search = ctypes.addressof(state.search)
        rows.count = self._kernels.t5_begin(
            search, ctypes.addressof(laid.pointers), rows.documents, rows.slots.data_ptr(),
            laid.drafts.data_ptr(), laid.drafted.data_ptr(), MOST_DRAFTS,
        )  # fmt: skip
        logits = self._model.decode(rows, state)
        made = torch.empty(rows.documents, dtype=torch.int32)
        done = torch.empty(rows.documents, dtype=torch.uint8)
        chosen = torch.empty(rows.count, dtype=torch.int32)
        self._kernels.t5_choose(
            search, ctypes.addressof(laid.pointers), rows.documents, rows.slots.data_ptr(),
            rows.count, logits.data_ptr(), chosen.data_ptr(), made.data_ptr(), done.data_ptr(),
        )  # fmt: skip
        advances = []
        made_by, done_by = made.tolist(), done.tolist()
        if self._speculation is not None:
            self._speculation.took(rows.count, time.perf_counter() - began)
            for draft in drafts:
                first = int(chosen[rows.firsts[draft.document]])
                self._speculation.learn(draft, made_by[draft.document], first)
        documents = zip(
            laid.entries, laid.slots, made_by, done_by, laid.drafted.tolist(), strict=True
        )
        for entry, slot, count, over, drafted in documents:
            settings = entry.request.settings
            new = ()
            if entry.request.stream and settings.num_beams == 1:
                new = state.tokens(slot)[-count:].tolist()
            output = state.output(slot) if over else None
            advances.append(Advance(entry, count, new, output, drafted))
        return advances

    def _draft(self, laid: _Laid) -> list[Draft]:
        """Look up what greedy documents may say next, and decide how much of it to try."""
        laid.drafted.zero_()
        if self._speculation is None:
            return []
        found: list[Draft] = []
        rows = 0
        for index, (entry, slot) in enumerate(zip(laid.entries, laid.slots, strict=True)):
            rows += entry.rows
            room = self._state.room(slot) - 1
            if entry.request.settings.num_beams > 1 or room < 1:
                continue
            tokens, to = self._state.tokens(slot), laid.drafts[index]
            count = self._kernels.t5_propose(
                self._state.sources[slot].ctypes.data, entry.tokens, tokens.ctypes.data,
                len(tokens), LONGEST_RUN, min(MOST_DRAFTS, room), to.data_ptr(),
                ctypes.addressof(self._run),
            )  # fmt: skip
            if count:
                found.append(Draft(index, self._run.value, count, int(to[0])))
        self._speculation.decide(found, rows, _DRAFT_ROWS)
        for draft in found:
            laid.drafted[draft.document] = draft.tried
        return found

    def _lay_out(self, only: Sequence[Entry] | None) -> _Laid:
        """The step's documents; built anew only after somebody came or left."""
        entries, slots = self.entries, self._slots
        if only is not None:
            slot_of = dict(zip(map(id, entries), slots, strict=True))
            entries, slots = list(only), [slot_of[id(entry)] for entry in only]
        laid = self._laid.get(tuple(slots))
        if laid is None:
            laid = self._laid[tuple(slots)] = _Laid(entries, slots)
        if self._state.self_caches[0].distances < self._state.steps_room:
            self._state.set_bias(self._model.distance_bias(self._state.steps_room))
        return laid


class _Laid:
    """Documents of a step, and what the kernels are told of them."""

    def __init__(self, entries: Sequence[Entry], slots: Sequence[int]) -> None:
        self.entries, self.slots = list(entries), list(slots)
        documents = len(slots)
        beams = sum(entry.rows for entry in entries)
        self.rows = StepRows(beams + _DRAFT_ROWS, documents)
        self.rows.documents = documents
        self.rows.slots.copy_(torch.tensor(self.slots, dtype=torch.int32))
        self.rows.sources.copy_(torch.tensor([e.tokens for e in entries], dtype=torch.int32))
        self.drafts = torch.zeros(documents, MOST_DRAFTS, dtype=torch.int32)
        self.drafted = torch.zeros(documents, dtype=torch.int32)
        self.pointers = _Rows(
            tokens=self.rows.tokens.data_ptr(), lanes=self.rows.lanes.data_ptr(),
            positions=self.rows.positions.data_ptr(), firsts=self.rows.firsts.data_ptr(),
            counts=self.rows.counts.data_ptr(),
        )  # fmt: skip


def _together(entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    """Runs of documents to encode at once, as half-open ranges."""
    start = tokens = 0
    for index, entry in enumerate(entries):
        if index > start and tokens + entry.tokens > _TOGETHER:
            yield start, index
            start, tokens = index, 0
        tokens += entry.tokens
    yield start, len(entries)
