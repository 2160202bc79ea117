"""What the running batch holds: lanes and slots, their caches and the state of their decoding.

A document has a slot, where its source's keys and values lie, and a lane for each beam, where its
own do. Both keep their places from admission to the end: nothing moves when others come and go.
Arrays are allocated whole and grow only for requests beyond the model's own limits; memory that no
document has touched yet costs nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.checkpoint import CheckpointError
from serve_app.engine.cpu.linear import Precision
from serve_app.engine.cpu.memory import empty
from serve_app.engine.protocol import EngineRequest, TokenConstraints
from serve_app.engine.weights import Shape

_PER_POSITION = {"cross_key_scales", "cross_key_offsets", "cross_value_scales"}
_UNLIKELY = -1e9  # `generate()`'s score of a beam that is not there
_BLOCK = 32  # positions; see native/cross_attention.cpp

_BY_LANE = {
    "tokens": np.int32, "ancestry": np.int32, "scores": np.float32, "best_tokens": np.int32,
    "best_steps": np.int32, "best_scores": np.float32, "best_done": np.uint8,
}  # fmt: skip
_LONG_LANE = ("tokens", "ancestry", "best_tokens")
_BY_DOCUMENT = {
    "beams": np.int32, "steps": np.int32, "least": np.int32, "most": np.int32, "ngram": np.int32,
    "length_penalty": np.float64, "repetition_penalty": np.float32, "early": np.uint8,
    "improvable": np.uint8,
}  # fmt: skip


class _Search(ctypes.Structure):
    """`Search` of native/search.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _BY_LANE),
        ("stride", ctypes.c_int64),
        ("lanes", ctypes.c_void_p),
        ("most_beams", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _BY_DOCUMENT),
        ("suppressed", ctypes.c_void_p),
        ("begin_suppressed", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in (
                "suppressed_count", "begin_suppressed_count", "forced_first", "forced_last",
                "vocabulary", "eos", "start",
            )
        ),
    )  # fmt: skip


class _SelfCache(ctypes.Structure):
    """`SelfCache` of native/self_attention.cpp."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("ancestry", ctypes.c_void_p),
        ("ancestry_stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("capacity", "heads", "width", "padded")),
        ("bias", ctypes.c_void_p),
        ("distances", ctypes.c_int),
    )


class _CrossCache(ctypes.Structure):
    """`CrossCache` of native/cross_attention.cpp."""

    _fields_ = (
        *(
            (n, ctypes.c_void_p)
            for n in ("keys", "values", "key_scales", "key_offsets", "value_scales")
        ),
        *((n, ctypes.c_int) for n in ("capacity", "heads", "width", "padded")),
    )


class State:
    """Lanes and slots.

    Args:
        shape: the model's.
        constraints: tokens it never gives, or always.
        precision: says what the caches hold.
        lanes: rows of the batch; there are as many slots.
        steps: new tokens that a lane has room for.
        source: input tokens that a slot has room for.
    """

    def __init__(
        self,
        shape: Shape,
        constraints: TokenConstraints,
        precision: Precision,
        *,
        lanes: int,
        steps: int,
        source: int,
    ) -> None:
        self._shape = shape
        self.padded = padded_width(shape)
        self.free_lanes: list[int] = []
        self.free_slots: list[int] = []
        self.lane_count = self.slot_count = self.steps_room = self.source_room = 0
        self._arrays: dict[str, np.ndarray] = {
            name: np.zeros((0, 0) if name in _LONG_LANE else 0, kind)
            for name, kind in (_BY_LANE | _BY_DOCUMENT).items()
        }
        self._arrays["lanes"] = np.zeros((0, 1), np.int32)
        self.sources = np.zeros((0, 0), np.int32)  # input ids, by slot
        kinds = {
            "keys": precision.between,
            "values": precision.between,
            "cross_keys": precision.kept,
            "cross_values": precision.kept,
        }
        if precision is Precision.INT8:
            kinds |= dict.fromkeys(_PER_POSITION, torch.float32)
        self._caches: dict[str, list[Tensor]] = {
            name: [torch.empty(0, 0, 0, dtype=kind)] * shape.decoder_layers
            for name, kind in kinds.items()
        }
        self._suppressed = np.array(constraints.suppressed, np.int32)
        self._begin_suppressed = np.array(constraints.begin_suppressed, np.int32)
        self.search = _Search(
            suppressed=self._suppressed.ctypes.data,
            suppressed_count=len(self._suppressed),
            begin_suppressed=self._begin_suppressed.ctypes.data,
            begin_suppressed_count=len(self._begin_suppressed),
            forced_first=_or_none(constraints.forced_first),
            forced_last=_or_none(constraints.forced_last),
            vocabulary=shape.vocabulary,
            eos=shape.eos_id,
            start=shape.start_id,
        )
        fixed = {"heads": shape.heads, "width": shape.head_width, "padded": self.padded}
        self.self_caches = [_SelfCache(**fixed) for _ in range(shape.decoder_layers)]
        self.cross_caches = [_CrossCache(**fixed) for _ in range(shape.decoder_layers)]
        self.reserve(lanes=lanes, steps=steps, source=source, beams=1)

    @property
    def cache_bytes(self) -> int:
        """Size of all caches."""
        return sum(c.nbytes for caches in self._caches.values() for c in caches)

    def reserve(self, *, lanes: int, steps: int, source: int, beams: int) -> None:
        """Grow to this many lanes, steps, source positions and beams a document, if need be.

        Raises:
            MemoryError, RuntimeError: out of memory; nothing has changed.
        """
        lanes = max(lanes, self.lane_count)
        steps = max(_up(steps), self.steps_room)
        source = max(_up(source), self.source_room)
        beams = max(beams, self._arrays["lanes"].shape[1])
        grown = (lanes, steps, source, beams)
        now = (self.lane_count, self.steps_room, self.source_room, self._arrays["lanes"].shape[1])
        if grown == now:
            return
        arrays: dict[str, np.ndarray] = {}
        for name in (*_BY_LANE, *_BY_DOCUMENT):
            # The start token, and room for drafts that reach behind the end.
            extent = (lanes, steps + 1) if name in _LONG_LANE else (lanes,)
            arrays[name] = _grown(self._arrays[name], extent)
        arrays["lanes"] = _grown(self._arrays["lanes"], (lanes, beams))
        sources = _grown(self.sources, (lanes, source))
        heads = self._shape.heads
        grown_caches: dict[str, list[Tensor]] = {}
        for name, caches in self._caches.items():
            room = source if name.startswith("cross") else steps
            width = 1 if name in _PER_POSITION else self.padded
            size = (lanes, heads, room * width)
            grown_caches[name] = [_grown_cache(cache, size) for cache in caches]
        # All of them or none: the kernels have addresses of the old ones until `_point`.
        self._arrays, self.sources, self._caches = arrays, sources, grown_caches
        self.free_slots.extend(range(self.slot_count, lanes))
        self.free_lanes.extend(range(self.lane_count, lanes))
        self.lane_count = self.slot_count = lanes
        self.steps_room, self.source_room = steps, source
        self._point(beams)

    def admit(self, request: EngineRequest) -> int:
        """Take a slot and lanes for a document; returns the slot. There must be enough."""
        settings = request.settings
        beams = settings.num_beams
        self.reserve(
            lanes=self.lane_count + max(beams - len(self.free_lanes), 0),
            steps=settings.max_new_tokens,
            source=len(request.input_ids),
            beams=beams,
        )
        slot = self.free_slots.pop()
        lanes = [self.free_lanes.pop() for _ in range(beams)]
        arrays = self._arrays
        arrays["lanes"][slot, :beams] = lanes
        for name, value in (
            ("beams", beams),
            ("steps", 0),
            ("least", settings.min_new_tokens),
            ("most", settings.max_new_tokens),
            ("ngram", settings.no_repeat_ngram_size),
            ("length_penalty", settings.length_penalty),
            ("repetition_penalty", settings.repetition_penalty),
            ("early", settings.early_stopping),
            ("improvable", True),
        ):
            arrays[name][slot] = value
        for beam, lane in enumerate(lanes):
            arrays["tokens"][lane, 0] = self._shape.start_id
            arrays["best_tokens"][lane, 0] = self._shape.start_id
            arrays["ancestry"][lane] = lane
            arrays["scores"][lane] = 0 if beam == 0 else _UNLIKELY
            arrays["best_scores"][lane] = _UNLIKELY
            arrays["best_steps"][lane] = arrays["best_done"][lane] = 0
        self.sources[slot, : len(request.input_ids)] = request.input_ids
        return slot

    def release(self, slot: int) -> None:
        """Give a document's slot and lanes back."""
        beams = int(self._arrays["beams"][slot])
        self.free_lanes.extend(self._arrays["lanes"][slot, :beams].tolist())
        self.free_slots.append(slot)

    def room(self, slot: int) -> int:
        """How many more it may have."""
        return int(self._arrays["most"][slot] - self._arrays["steps"][slot])

    def tokens(self, slot: int) -> np.ndarray:
        """A greedy document's tokens, the start token first."""
        lane = self._arrays["lanes"][slot, 0]
        row: np.ndarray = self._arrays["tokens"][lane, : self._arrays["steps"][slot] + 1]
        return row

    def output(self, slot: int) -> list[int]:
        """A done document's tokens without the start token."""
        if self._arrays["beams"][slot] == 1:
            return list(map(int, self.tokens(slot)[1:]))
        lane = self._arrays["lanes"][slot, 0]
        steps = self._arrays["best_steps"][lane]
        return list(map(int, self._arrays["best_tokens"][lane, 1 : steps + 1]))

    def set_bias(self, bias: Tensor) -> None:
        """Decoder self-attention bias, (heads, distances), farthest first."""
        self._bias = bias
        for cache in self.self_caches:
            cache.bias, cache.distances = bias.data_ptr(), bias.shape[1]

    def check(self, slots: Sequence[int]) -> None:
        """Assert that every slot and lane is either free or held by one of these documents."""
        held = [int(i) for s in slots for i in self._arrays["lanes"][s, : self._arrays["beams"][s]]]
        assert sorted([*self.free_slots, *slots]) == list(range(self.slot_count)), "a slot leaked"
        assert sorted([*self.free_lanes, *held]) == list(range(self.lane_count)), "a lane leaked"

    def _point(self, beams: int) -> None:
        """Tell the kernels where everything lies now."""
        for name in (*_BY_LANE, *_BY_DOCUMENT, "lanes"):
            setattr(self.search, name, self._arrays[name].ctypes.data)
        self.search.stride = self._arrays["tokens"].shape[1]
        self.search.most_beams = beams
        for layer, cache in enumerate(self.self_caches):
            cache.keys = self._caches["keys"][layer].data_ptr()
            cache.values = self._caches["values"][layer].data_ptr()
            cache.ancestry = self._arrays["ancestry"].ctypes.data
            cache.ancestry_stride = self._arrays["ancestry"].shape[1]
            cache.capacity = self.steps_room
        for layer, cross in enumerate(self.cross_caches):
            cross.keys = self._caches["cross_keys"][layer].data_ptr()
            cross.values = self._caches["cross_values"][layer].data_ptr()
            for name in _PER_POSITION & self._caches.keys():
                address = self._caches[name][layer].data_ptr()
                setattr(cross, name.removeprefix("cross_"), address)
            cross.capacity = self.source_room


def padded_width(shape: Shape) -> int:
    """How many values a head takes in caches; see native/cross_attention.cpp.

    Raises:
        CheckpointError: the kernels are not made for heads this wide.
    """
    for width in (32, 64, 128):
        if shape.head_width <= width:
            return width
    raise CheckpointError(f"config.json: d_kv {shape.head_width} is above 128, the limit on a CPU")


def _up(positions: int) -> int:
    return -(-positions // _BLOCK) * _BLOCK


def _or_none(token: int | None) -> int:
    return -1 if token is None else token


def _grown(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    bigger = np.zeros(size, array.dtype)
    bigger[tuple(slice(0, extent) for extent in array.shape)] = array
    return bigger


def _grown_cache(cache: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(cache.shape) == size:
        return cache
    bigger = empty(size, cache.dtype)
    bigger[tuple(slice(0, extent) for extent in cache.shape)] = cache
    return bigger
