"""Slots of the running batch: each document's caches and decoding state.

Documents with the same number of beams form a `Group`; they lie in slots 0 to n-1 of its tensors,
so that a step works on views. Who leaves is replaced by the last one. Rows of a document's beams
share its cross-attention keys and values. Self-attention keys stay where they were written: which
beam's key a hypothesis descends from at each position is looked up in `ancestry` and masked, and
nothing is copied when beams change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from serve_app.engine.gpu.model import T5
from serve_app.engine.gpu.state import State
from serve_app.engine.queue import Entry

UNLIKELY = -1e9  # `generate()`'s score of a beam that is not there
_ROOM = 64  # tensors grow at least by so many positions


class View(NamedTuple):
    """How much of a group's tensors a step works on: slots, generated positions, source positions.

    A CUDA graph is of one view, so there steps work on few, rounded-up ones. Slots behind the last
    document have no source and no steps; what is computed for them is of no meaning.
    """

    slots: int
    depth: int
    source: int


class Group:
    """Documents decoded with `beams` beams each; their `state` is a `State`."""

    _CACHES = ("keys", "values", "cross_keys", "cross_values")  # the slot is the second dimension

    def __init__(self, model: T5, beams: int) -> None:
        self.beams = beams
        self.entries: list[Entry] = []
        self._model = model
        shape, device, dtype = model.shape, model.device, model.dtype
        layers, heads, width = shape.decoder_layers, shape.heads, shape.head_width

        def empty(*size: int) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.state = State(0, beams, 0, device)
        self.keys = empty(layers, 0, heads, 0, beams, width)
        self.values = empty(layers, 0, heads, 0, beams, width)
        self.cross_keys = empty(layers, 0, heads, width, 0)
        self.cross_values = empty(layers, 0, heads, 0, width)
        # Kept beside the tensors, to be asked without waiting for the device.
        self._depth: list[int] = []
        self._source: list[int] = []
        self.moved = 0  # how often the tensors have been allocated anew

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def rows(self) -> int:
        """Rows of the batch that the group's documents take."""
        return len(self.entries) * self.beams

    @property
    def cache_bytes(self) -> int:
        """Size of the attention's caches."""
        return sum(getattr(self, name).nbytes for name in self._CACHES)

    @property
    def _room(self) -> tuple[int, int, int]:
        """Slots, steps and source positions that the tensors hold."""
        return len(self.state.rows), self.state.ancestry.shape[2], self.cross_values.shape[3]

    @property
    def longest(self) -> int:
        """Most tokens that one of the documents has generated."""
        return max(self._depth)

    def view(self, *, rounded: bool) -> View:
        """What the next step works on."""
        exact = View(len(self.entries), max(self._depth) + 1, max(self._source))
        if not rounded:
            return exact
        room = View(*self._room)
        least = View(1, _ROOM, 2 * _ROOM)
        return View(
            *(min(up(n, low), most) for n, low, most in zip(exact, least, room, strict=True))
        )

    def admit(self, entries: Sequence[Entry], lengths: Sequence[int], encoded: Tensors) -> None:
        """Give documents slots.

        Args:
            entries: the documents.
            lengths: their source lengths.
            encoded: `T5.encode`'s keys and values, of these documents, in this order.
        """
        keys, values = encoded
        first, count, source = len(self.entries), len(entries), max(lengths)
        asked = [entry.request.settings for entry in entries]
        self.reserve(first + count, max(one.max_new_tokens for one in asked), source)
        slots = slice(first, first + count)
        # Made on the host and copied at once; from pinned memory, which nobody waits for.
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
        self.state.rows[slots].copy_(new.rows, non_blocking=True)
        self.cross_keys[:, slots, ..., :source] = keys[..., :source]
        self.cross_values[:, slots, :, :source] = values[..., :source, :]
        self.entries.extend(entries)
        self._depth.extend([0] * count)
        self._source.extend(lengths)

    def leave(self, slots: Sequence[int]) -> None:
        """Free slots; the last documents move into the gaps."""
        for slot in sorted(slots, reverse=True):
            last = len(self.entries) - 1
            if slot != last:
                self.state.rows[slot].copy_(self.state.rows[last])
                depth, source = self._depth[last], self._source[last]
                for tensor in (self.keys, self.values):
                    tensor[:, slot, :, :depth] = tensor[:, last, :, :depth]
                self.cross_keys[:, slot, ..., :source] = self.cross_keys[:, last, ..., :source]
                self.cross_values[:, slot, :, :source] = self.cross_values[:, last, :, :source]
            self.state.rows[last].zero_()
            self.entries[slot] = self.entries[last]
            self._depth[slot], self._source[slot] = self._depth[last], self._source[last]
            del self.entries[last], self._depth[last], self._source[last]

    def begin(self, view: View) -> Tensor:
        """Prepare a step; returns each row's newest token, (slots * beams,)."""
        device, (count, depth, source) = self._model.device, view
        self._view = view
        state, lowest = self.state, torch.finfo(self._model.dtype).min
        steps = state.steps[:count]
        position = torch.arange(depth, device=device)
        back = steps[:, None] - position
        distances = self._model.distance_bias(state.ancestry.shape[2])
        bias = distances[:, back.clamp(min=0)].transpose(0, 1)
        seen = back >= 0
        here = steps[:, None, None].expand(-1, self.beams, 1)
        if self.beams == 1:
            mask = bias.masked_fill(~seen[:, None], lowest)[:, :, None]
        else:
            beam = torch.arange(self.beams, device=device)
            state.ancestry[:count].scatter_(2, here, beam[None, :, None].expand(count, -1, 1))
            own = state.ancestry[:count, :, :depth, None] == beam
            own &= seen[:, None, :, None]
            wide = bias[:, :, None, :, None].expand(-1, -1, self.beams, -1, self.beams)
            mask = wide.masked_fill(~own[:, None], lowest).flatten(3)
        self._mask = mask
        self._slot = torch.arange(count, device=device)
        padding = torch.arange(source, device=device) >= state.sources[:count, None]
        nothing = torch.zeros(padding.shape, dtype=self._model.dtype, device=device)
        self._cross_mask = nothing.masked_fill_(padding, lowest)[:, None, None]
        return state.tokens[:count].gather(2, here).flatten()

    def outputs(self, slots: Sequence[int]) -> list[list[int]]:
        """Tokens of documents that are done, without the start token."""
        if not slots:
            return []
        state, end = self.state, self.longest + 1
        if self.beams == 1:
            steps = [self._depth[slot] for slot in slots]
            tokens = state.tokens
        else:
            steps = torch.stack([state.best_steps[slot, 0] for slot in slots]).tolist()
            tokens = state.best_tokens
        # One copy from the device for all of them.
        rows = torch.stack([tokens[slot, 0, 1:end] for slot in slots]).tolist()
        return [row[:count] for row, count in zip(rows, steps, strict=True)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Self-attention of the group's rows; see `serve_app.engine.gpu.model.SelfAttend`."""
        count, depth, _ = self._view
        here = self.state.steps[:count]
        self.keys[layer][self._slot, :, here] = self._by_head(key)
        self.values[layer][self._slot, :, here] = self._by_head(value)
        keys = self.keys[layer, :count, :, :depth].flatten(2, 3)
        values = self.values[layer, :count, :, :depth].flatten(2, 3)
        scores = self._by_head(query) @ keys.transpose(-1, -2) + self._mask
        return self._by_row(torch.softmax(scores, -1) @ values)

    def cross(self, layer: int, query: Tensor) -> Tensor:
        """Cross-attention of the group's rows; see `serve_app.engine.gpu.model.CrossAttend`."""
        count, _, source = self._view
        keys = self.cross_keys[layer, :count, ..., :source]
        values = self.cross_values[layer, :count, :, :source]
        scores = self._by_head(query) @ keys + self._cross_mask
        return self._by_row(torch.softmax(scores, -1) @ values)

    def end(self) -> None:
        """Count the step that has been decoded."""
        self.state.steps[: len(self.entries)] += 1
        self._depth = [depth + 1 for depth in self._depth]

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
            size = [tensor.shape[0], slots, *tensor.shape[2:]]
            size[{"cross_keys": 4}.get(name, 3)] = source if name.startswith("cross") else steps
            tensors[name] = _resized(tensor, size)
        # All of them or, out of memory, none.
        self.state = state
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self.moved += 1


Tensors = tuple[Tensor, Tensor]


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
