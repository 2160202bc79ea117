"""Slots of the running batch: each document's caches and decoding state.

Documents with the same number of beams form a `Group`; they lie in the first slots of its tensors,
so that a step works on views. Who leaves makes a gap for the next to come; documents move into gaps
only where the step's view becomes smaller by it. Rows of a document's beams share its
cross-attention keys and values. Self-attention keys stay where they were written: which
beam's key a hypothesis descends from at each position is looked up in `ancestry` and masked, and
nothing is copied when beams change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from serve_app.engine.gpu.attention import StepAttention
from serve_app.engine.gpu.model import T5, UNSEEN
from serve_app.engine.gpu.state import State
from serve_app.engine.queue import Entry

UNLIKELY = -1e9  # `generate()`'s score of a beam that is not there
_ROOM = 64  # tensors grow at least by so many positions


class View(NamedTuple):
    """How much of a group's tensors a step works on: slots, generated positions, source positions.

    A CUDA graph is of one view, so there steps work on few, rounded-up ones. Slots without a
    document have no source and no steps; what is computed for them is of no meaning.
    """

    slots: int
    depth: int
    source: int


class Rules(NamedTuple):
    """What the settings of a group's documents have search do at all: whether any asks for a
    repetition penalty, and n-gram sizes of which some document wants no repeats, ascending.

    Which document asks for what is in its `State`; a CUDA graph is of one set of rules, too.
    """

    penalty: bool
    ngrams: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Seat:
    """A document in its slot, and what the host knows of it without asking the device.

    `depth` counts the steps that have been launched for it; `tokens` are those that the host has
    seen, of greedy search.
    """

    entry: Entry
    source: int
    depth: int = 0
    tokens: list[int] = field(default_factory=list)


class Group:
    """Documents decoded with `beams` beams each; their `state` is a `State`.

    Args:
        model: whose shape, device and dtype the caches have.
        beams: of each document.
        rounded: whether steps work on rounded-up views.
        attention: the kernels, if there are.
    """

    _CACHES = ("kept", "crossed")

    def __init__(
        self,
        model: T5,
        beams: int,
        *,
        rounded: bool = False,
        attention: StepAttention | None = None,
    ) -> None:
        self.beams = beams
        self.seats: list[Seat | None] = []  # by slot; the last one is taken
        self._model, self._rounded, self._attention = model, rounded, attention
        shape, device, dtype = model.shape, model.device, model.dtype
        layers, heads, width = shape.decoder_layers, shape.heads, shape.head_width

        def empty(*size: int) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.state = State(0, beams, 0, device)
        # Keys and values in one tensor, so that they are stored with one launch.
        self.kept = empty(layers, 2, 0, heads, 0, beams, width)
        self.crossed = empty(layers, 2, 0, heads, 0, width)
        self._index = torch.empty(0, dtype=torch.int64, device=device)  # so that leaving needs none
        self._rules: Rules | None = None
        self.moved = 0  # how often the tensors have been allocated anew

    def __len__(self) -> int:
        return len(self.seats) - self.seats.count(None)

    @property
    def entries(self) -> list[Entry]:
        """The documents, by slot."""
        return [seat.entry for seat in self.seats if seat is not None]

    @property
    def rows(self) -> int:
        """Rows of the batch that the group's documents take."""
        return len(self) * self.beams

    @property
    def cache_bytes(self) -> int:
        """Size of the attention's caches."""
        return sum(getattr(self, name).nbytes for name in self._CACHES)

    @property
    def _room(self) -> tuple[int, int, int]:
        """Slots, steps and source positions that the tensors hold."""
        return len(self.state.rows), self.state.ancestry.shape[2], self.crossed.shape[4]

    @property
    def longest(self) -> int:
        """Most steps that have been launched for one of the documents."""
        return max(seat.depth for seat in self.seats if seat is not None)

    @property
    def rules(self) -> Rules:
        """What search must do for the documents that are there."""
        if self._rules is None:
            asked = [entry.request.settings for entry in self.entries]
            penalty = any(one.repetition_penalty != 1.0 for one in asked)
            ngrams = {one.no_repeat_ngram_size for one in asked} - {0}
            self._rules = Rules(penalty, tuple(sorted(ngrams)))
        return self._rules

    def view(self) -> View:
        """What the next step works on."""
        if self._attention is not None:  # the kernels read no more than there is, whatever the view
            slots, *rest = self._room
            return View(min(up(len(self.seats), 1), slots), *rest)
        source = max(seat.source for seat in self.seats if seat is not None)
        exact = View(len(self.seats), self.longest + 1, source)
        if not self._rounded:
            return exact
        room = View(*self._room)
        least = View(1, _ROOM, 2 * _ROOM)
        return View(
            *(min(up(n, low), most) for n, low, most in zip(exact, least, room, strict=True))
        )

    def admit(self, entries: Sequence[Entry], lengths: Sequence[int], encoded: Tensor) -> None:
        """Give documents slots.

        Args:
            entries: the documents.
            lengths: their source lengths.
            encoded: `T5.encode`'s keys and values, of these documents, in this order.
        """
        count, source = len(entries), max(lengths)
        asked = [entry.request.settings for entry in entries]
        gaps = [slot for slot, seat in enumerate(self.seats) if seat is None][:count]
        end = len(self.seats) + count - len(gaps)
        slots = [*gaps, *range(len(self.seats), end)]
        # A step may be under way for who has ended without the host knowing yet.
        self.reserve(end, max(one.max_new_tokens for one in asked) + 1, source)
        # Made on the host and copied at once.
        new = State(
            count, self.beams, self.state.ancestry.shape[2], torch.device("cpu"),
            pinned=self._model.device.type == "cuda",
        )  # fmt: skip
        new.least[:] = torch.tensor([one.min_new_tokens for one in asked])
        new.most[:] = torch.tensor([one.max_new_tokens for one in asked])
        new.ngram[:] = torch.tensor([one.no_repeat_ngram_size for one in asked])
        new.penalty[:] = torch.tensor([one.length_penalty for one in asked], dtype=torch.float64)
        new.repetition[:] = torch.tensor([one.repetition_penalty for one in asked])
        new.early[:] = torch.tensor([one.early_stopping for one in asked])
        new.sources[:] = torch.tensor(lengths)
        new.tokens[:, :, 0] = self._model.shape.start_id
        new.scores[:, 1:] = UNLIKELY
        new.best_scores.fill_(UNLIKELY)
        new.improvable.fill_(True)
        device = self._model.device
        index = on_device(torch.tensor(slots), device)
        self.state.rows[index] = on_device(new.rows, device)
        self.crossed[:, :, index, :, :source] = encoded[..., :source, :]
        self.seats += [None] * (end - len(self.seats))
        for slot, entry, length in zip(slots, entries, lengths, strict=True):
            self.seats[slot] = Seat(entry, length)
        self._rules = None

    def leave(self, slots: Sequence[int]) -> None:
        """Free slots."""
        if not slots:
            return
        for slot in slots:
            self.seats[slot] = None
        self._clear(slots)
        self._close_gaps()
        self._rules = None

    def _clear(self, slots: Sequence[int]) -> None:
        index = self._index[: len(slots)]
        to_device(torch.tensor(slots), index)
        self.state.rows.index_fill_(0, index, 0)

    def _close_gaps(self) -> None:
        """Move the last documents into gaps, if the view becomes smaller by it."""
        count = len(self)
        least = up(count, 1) if self._rounded and count else count
        if len(self.seats) > least:
            moved = [slot for slot in range(least, len(self.seats)) if self.seats[slot] is not None]
            gaps = [slot for slot in range(least) if self.seats[slot] is None]
            for last, gap in zip(moved, gaps, strict=False):
                self._move(last, gap)
            if moved:
                self._clear(moved)
            del self.seats[least:]
        while self.seats and self.seats[-1] is None:
            del self.seats[-1]

    def _move(self, last: int, gap: int) -> None:
        """One by one, as copies within the tensors: leaving must not need memory."""
        seat = self.seats[last]
        assert seat is not None
        depth, source = seat.depth, seat.source
        self.state.rows[gap].copy_(self.state.rows[last])
        self.kept[:, :, gap, :, :depth] = self.kept[:, :, last, :, :depth]
        self.crossed[:, :, gap, :, :source] = self.crossed[:, :, last, :, :source]
        self.seats[gap] = seat

    def begin(self, view: View) -> Tensor:
        """Prepare a step on a view; returns each row's newest token, (slots * beams,)."""
        device, count = self._model.device, view.slots
        self._view = view
        state = self.state
        steps = state.steps[:count]
        here = steps[:, None, None].expand(-1, self.beams, 1)
        if self.beams > 1:
            beam = torch.arange(self.beams, device=device)
            state.ancestry[:count].scatter_(2, here, beam[None, :, None].expand(count, -1, 1))
        self._distances = self._model.distance_bias(state.ancestry.shape[2])
        if self._attention is None:
            self._make_masks(view)
        return state.tokens[:count].gather(2, here).flatten()

    def _make_masks(self, view: View) -> None:
        device, (count, depth, source) = self._model.device, view
        state = self.state
        position = torch.arange(depth, device=device)
        back = state.steps[:count, None] - position
        bias = self._distances[:, back.clamp(min=0)].transpose(0, 1)
        seen = back >= 0
        if self.beams == 1:
            mask = bias.masked_fill(~seen[:, None], UNSEEN)[:, :, None]
        else:
            beam = torch.arange(self.beams, device=device)
            own = state.ancestry[:count, :, :depth, None] == beam
            own &= seen[:, None, :, None]
            wide = bias[:, :, None, :, None].expand(-1, -1, self.beams, -1, self.beams)
            mask = wide.masked_fill(~own[:, None], UNSEEN).flatten(3)
        self._mask = mask
        self._slot = torch.arange(count, device=device)
        padding = torch.arange(source, device=device) >= state.sources[:count, None]
        nothing = torch.zeros(padding.shape, dtype=self._model.dtype, device=device)
        self._cross_mask = nothing.masked_fill_(padding, UNSEEN)[:, None, None]

    def outputs(self, slots: Sequence[int]) -> list[list[int]]:
        """Tokens of documents with beams that are done, without the start token.

        Waits for the device: beams are not known to the host before.
        """
        if not slots:
            return []
        state, end = self.state, self.longest + 1
        index = on_device(torch.tensor(slots), self._model.device)
        steps = state.best_steps[index, 0, None]
        # One copy from the device for all of them.
        rows = torch.cat([steps, state.best_tokens[index, 0, 1:end]], 1).tolist()
        return [row[:count] for count, *row in rows]

    def attend(self, layer: int, joined: Tensor) -> Tensor:
        """Self-attention of the group's rows; see `serve_app.engine.gpu.model.SelfAttend`."""
        if self._attention is not None:
            state = self.state
            keys, values = self.kept[layer]
            return self._attention.generated(
                joined, keys, values, state.steps, state.ancestry, self._distances
            )
        count, depth, _ = self._view
        here = self.state.steps[:count]
        heads, width = self._model.shape.heads, self._model.shape.head_width
        query, new = joined.tensor_split((heads * width,), -1)
        new = new.view(count, self.beams, 2, heads, width).permute(0, 2, 3, 1, 4)
        self.kept[layer][:, self._slot, :, here] = new
        keys, values = self.kept[layer, :, :count, :, :depth].flatten(3, 4)
        scores = self._by_head(query) @ keys.transpose(-1, -2) + self._mask
        return self._by_row(torch.softmax(scores, -1) @ values)

    def cross(self, layer: int, query: Tensor) -> Tensor:
        """Cross-attention of the group's rows; see `serve_app.engine.gpu.model.CrossAttend`."""
        count, _, source = self._view
        if self._attention is not None:
            keys, values = self.crossed[layer]
            return self._attention.cross(query, keys, values, self.state.sources, self.beams)
        keys, values = self.crossed[layer, :, :count, :, :source]
        scores = self._by_head(query) @ keys.transpose(-1, -2) + self._cross_mask
        return self._by_row(torch.softmax(scores, -1) @ values)

    def end(self) -> None:
        """Count the step that `begin` has prepared, on the device.

        None is counted beyond a document's last one, nor in slots without a document: what lies
        there must go on pointing into the tensors.
        """
        steps, most = self.state.steps[: self._view.slots], self.state.most[: self._view.slots]
        steps += steps < most

    def launched(self) -> None:
        """Count a step on the host."""
        for seat in self.seats:
            if seat is not None:
                seat.depth += 1

    def _by_head(self, rows: Tensor) -> Tensor:
        """(documents * beams, heads * width) to (documents, heads, beams, width)."""
        shape = self._model.shape
        return rows.view(-1, self.beams, shape.heads, shape.head_width).transpose(1, 2)

    def _by_row(self, mixed: Tensor) -> Tensor:
        """The way back."""
        return mixed.transpose(1, 2).flatten(0, 1).flatten(1)

    def reserve(self, slots: int, steps: int, source: int) -> None:
        """Grow the tensors so that they hold this much, at least by half or `_ROOM` at a time."""

        def grown(now: int, wanted: int, room: int) -> int:
            return now if wanted <= now else max(wanted, now + max(now // 2, room))

        now = self._room
        slots = grown(now[0], slots, 4)
        steps = grown(now[1], steps, _ROOM)
        source = grown(now[2], source, _ROOM)
        if (slots, steps, source) == now:
            return
        state = State(slots, self.beams, steps, self._model.device)
        state.take_over(self.state)
        tensors: dict[str, Tensor] = {}
        for name in self._CACHES:
            tensor = getattr(self, name)
            size = list(tensor.shape)
            size[2], size[4] = slots, steps if name == "kept" else source
            tensors[name] = _resized(tensor, size)
        index = torch.empty(slots, dtype=torch.int64, device=self._model.device)
        # All of them or, out of memory, none.
        self.state, self._index = state, index
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self.moved += 1


def to_device(host: Tensor, target: Tensor) -> None:
    """Copy what the host has made. It does not wait for steps under way: only pinned memory is
    read after the call has returned."""
    if target.device.type != "cpu" and not host.is_pinned():
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor that the host has made, on the device; see `to_device`."""
    if device.type == "cpu":
        return host
    target = torch.empty(host.shape, dtype=host.dtype, device=device)
    to_device(host, target)
    return target


def up(count: int, least: int) -> int:
    """The next power of two times `least`."""
    while least < count:
        least *= 2
    return least


def _resized(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """The tensor with more room, zeros where there was nothing."""
    if list(tensor.shape) == list(size):
        return tensor
    bigger = torch.zeros(list(size), dtype=tensor.dtype, device=tensor.device)
    bigger[tuple(slice(0, extent) for extent in tensor.shape)] = tensor
    return bigger
