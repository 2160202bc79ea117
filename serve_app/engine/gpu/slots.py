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
from serve_app.engine.queue import Entry

LOWEST = torch.finfo(torch.float32).min
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
    """Documents decoded with `beams` beams each.

    State of slot i (the first dimension): `tokens` (beams, 1 + steps), the start token first;
    `steps`, the tokens generated so far; the request's `least` and `most` new tokens, n-gram size
    `ngram`, length `penalty`, `repetition` penalty and `early` stopping; `sources`, the length of
    its input. For beam search `scores` (beams,), `ancestry` (beams, steps), and of the finished
    hypotheses `best_tokens`,
    `best_scores`, `best_done`, `best_steps`; `improvable` says whether running beams may still beat
    them.
    """

    _SLOTTED = (
        "tokens", "steps", "least", "most", "ngram", "penalty", "early", "scores", "ancestry",
        "best_tokens", "best_scores", "best_done", "best_steps", "improvable", "sources",
        "repetition",
    )  # fmt: skip
    _CACHES = ("keys", "values", "cross_keys", "cross_values")  # the slot is the second dimension

    def __init__(self, model: T5, beams: int) -> None:
        self.beams = beams
        self.entries: list[Entry] = []
        self._model = model
        shape, device, dtype = model.shape, model.device, model.dtype
        layers, heads, width = shape.decoder_layers, shape.heads, shape.head_width

        def empty(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.tokens = empty(0, beams, 1)
        self.steps, self.least, self.most, self.ngram = (empty(0) for _ in range(4))
        self.penalty = empty(0, dtype=torch.float64)
        self.repetition = empty(0, dtype=torch.float32)
        self.early, self.improvable = (empty(0, dtype=torch.bool) for _ in range(2))
        self.scores = empty(0, beams, dtype=torch.float32)
        self.ancestry = empty(0, beams, 0)
        self.best_tokens = empty(0, beams, 1)
        self.best_scores = empty(0, beams, dtype=torch.float32)
        self.best_done = empty(0, beams, dtype=torch.bool)
        self.best_steps = empty(0, beams)
        self.sources = empty(0)
        self.keys = empty(layers, 0, heads, 0, beams, width, dtype=dtype)
        self.values = empty(layers, 0, heads, 0, beams, width, dtype=dtype)
        self.cross_keys = empty(layers, 0, heads, width, 0, dtype=dtype)
        self.cross_values = empty(layers, 0, heads, 0, width, dtype=dtype)
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
    def longest(self) -> int:
        """Most tokens that one of the documents has generated."""
        return max(self._depth)

    def view(self, *, rounded: bool) -> View:
        """What the next step works on."""
        exact = View(len(self.entries), max(self._depth) + 1, max(self._source))
        if not rounded:
            return exact
        room = View(self.steps.shape[0], self.ancestry.shape[2], self.cross_values.shape[3])
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
        most = max(entry.request.settings.max_new_tokens for entry in entries)
        self.reserve(first + count, most, source)
        slots = slice(first, first + count)
        for name in self._SLOTTED:
            getattr(self, name)[slots] = 0
        for index, (entry, length) in enumerate(zip(entries, lengths, strict=True), first):
            settings = entry.request.settings
            self.least[index] = settings.min_new_tokens
            self.most[index] = settings.max_new_tokens
            self.ngram[index] = settings.no_repeat_ngram_size
            self.penalty[index] = settings.length_penalty
            self.repetition[index] = settings.repetition_penalty
            self.early[index] = settings.early_stopping
            self.sources[index] = length
        self.tokens[slots, :, 0] = self._model.shape.start_id
        self.scores[slots, 1:] = UNLIKELY
        self.best_scores[slots] = UNLIKELY
        self.improvable[slots] = True
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
                for name in self._SLOTTED:
                    tensor = getattr(self, name)
                    tensor[slot] = tensor[last]
                depth, source = self._depth[last], self._source[last]
                for tensor in (self.keys, self.values):
                    tensor[:, slot, :, :depth] = tensor[:, last, :, :depth]
                self.cross_keys[:, slot, ..., :source] = self.cross_keys[:, last, ..., :source]
                self.cross_values[:, slot, :, :source] = self.cross_values[:, last, :, :source]
            self.steps[last] = self.sources[last] = 0
            self.entries[slot] = self.entries[last]
            self._depth[slot], self._source[slot] = self._depth[last], self._source[last]
            del self.entries[last], self._depth[last], self._source[last]

    def begin(self, view: View) -> Tensor:
        """Prepare a step; returns each row's newest token, (slots * beams,)."""
        device, (count, depth, source) = self._model.device, view
        self._view = view
        steps = self.steps[:count]
        position = torch.arange(depth, device=device)
        back = steps[:, None] - position
        distances = self._model.distance_bias(self.ancestry.shape[2])
        bias = distances[:, back.clamp(min=0)].transpose(0, 1)
        seen = back >= 0
        here = steps[:, None, None].expand(-1, self.beams, 1)
        if self.beams == 1:
            mask = bias.masked_fill(~seen[:, None], LOWEST)[:, :, None]
        else:
            beam = torch.arange(self.beams, device=device)
            self.ancestry[:count].scatter_(2, here, beam[None, :, None].expand(count, -1, 1))
            own = self.ancestry[:count, :, :depth, None] == beam
            own &= seen[:, None, :, None]
            wide = bias[:, :, None, :, None].expand(-1, -1, self.beams, -1, self.beams)
            mask = wide.masked_fill(~own[:, None], LOWEST).flatten(3)
        self._mask = mask
        self._slot = torch.arange(count, device=device)
        padding = torch.arange(source, device=device) >= self.sources[:count, None]
        self._cross_mask = torch.zeros(padding.shape, device=device).masked_fill_(padding, LOWEST)
        self._cross_mask = self._cross_mask[:, None, None]
        return self.tokens[:count].gather(2, here).flatten()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Self-attention of the group's rows; see `serve_app.engine.gpu.model.SelfAttend`."""
        count, depth, _ = self._view
        here = self.steps[:count]
        self.keys[layer][self._slot, :, here] = self._by_head(key)
        self.values[layer][self._slot, :, here] = self._by_head(value)
        keys = self.keys[layer, :count, :, :depth].flatten(2, 3)
        values = self.values[layer, :count, :, :depth].flatten(2, 3)
        scores = self._by_head(query) @ keys.transpose(-1, -2) + self._mask
        return self._by_row(torch.softmax(scores, -1).to(values.dtype) @ values)

    def cross(self, layer: int, query: Tensor) -> Tensor:
        """Cross-attention of the group's rows; see `serve_app.engine.gpu.model.CrossAttend`."""
        count, _, source = self._view
        keys = self.cross_keys[layer, :count, ..., :source]
        values = self.cross_values[layer, :count, :, :source]
        scores = self._by_head(query) @ keys + self._cross_mask
        return self._by_row(torch.softmax(scores, -1).to(values.dtype) @ values)

    def end(self) -> None:
        """Count the step that has been decoded."""
        self.steps[: len(self.entries)] += 1
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

        slots = grown(self.steps.shape[0], slots, 4)
        steps = grown(self.ancestry.shape[2], steps, _ROOM)
        source = grown(self.cross_values.shape[3], source, _ROOM)
        if (slots, steps, source) == (
            self.steps.shape[0], self.ancestry.shape[2], self.cross_values.shape[3],
        ):  # fmt: skip
            return
        tensors: dict[str, Tensor] = {}
        for name in self._SLOTTED:
            tensor = getattr(self, name)
            size = [slots, *tensor.shape[1:]]
            if name in ("tokens", "best_tokens"):
                size[2] = steps + 1
            elif name == "ancestry":
                size[2] = steps
            tensors[name] = _resized(tensor, size)
        for name in self._CACHES:
            tensor = getattr(self, name)
            size = [tensor.shape[0], slots, *tensor.shape[2:]]
            size[{"cross_keys": 4}.get(name, 3)] = source if name.startswith("cross") else steps
            tensors[name] = _resized(tensor, size)
        # All of them or, out of memory, none.
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
