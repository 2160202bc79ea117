"""The T5 forward pass (Raffel et al. 2020) over rows that need not be alike: no padding anywhere.

The encoder takes the tokens of several documents one after the other; a decoder step takes one row
for each lane, or several for a document that tries drafts. Residuals are float32; `linear.Rows`
says what the products take and give.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serve_app.engine.cpu.linear import (
    FORMATS,
    Linear,
    Precision,
    Rows,
    few_rows,
    head,
    many_rows,
)
from serve_app.engine.cpu.state import State, padded_width
from serve_app.engine.weights import Attention, FeedForward, Shape, WeightSource, buckets

_ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_new": 2, "silu": 3}  # native/rows.cpp


class _Encoder(ctypes.Structure):
    """`Encoder` of native/encoder.cpp."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("heads", "width", "padded")),
        ("bias", ctypes.c_void_p),
        ("reach", ctypes.c_int),
    )


class StepRows:
    """The rows of one decoder step, laid out by `t5_begin`; all int32.

    `tokens`, `lanes` and `positions` by row; `slots`, `sources` (input lengths), `firsts` and
    `counts` (rows) by document.
    """

    def __init__(self, rows: int, documents: int) -> None:
        self.tokens, self.lanes, self.positions = torch.zeros(3, rows, dtype=torch.int32)
        self.slots, self.sources, self.firsts, self.counts = torch.zeros(
            4, documents, dtype=torch.int32
        )
        self.count = self.documents = 0


class _Block:
    def __init__(
        self, attention: Attention, feed_forward: FeedForward, linear: Callable[[Tensor], Linear]
    ) -> None:
        self.norm = attention.norm.float()
        self.joined = linear(torch.cat([attention.query, attention.key, attention.value]))
        self.out = linear(attention.out)
        self.inner_norm = feed_forward.norm.float()
        self.inner = linear(feed_forward.inner)
        self.inner_out = linear(feed_forward.out)


class _Cross:
    def __init__(self, attention: Attention, linear: Callable[[Tensor], Linear]) -> None:
        self.norm = attention.norm.float()
        self.query = linear(attention.query)
        self.out = linear(attention.out)


class CpuT5:
    """Weights and what is computed with them. All methods run in inference mode, on one thread."""

    def __init__(
        self, weights: WeightSource, shape: Shape, precision: Precision, kernels: ctypes.PyDLL
    ) -> None:
        self.shape = shape
        self.precision = precision
        self._kernels = kernels
        self._embedding = weights.embedding().to(precision.between).contiguous()
        self.weight_bytes = self._embedding.nbytes

        def counted(product: Linear) -> Linear:
            self.weight_bytes += product.nbytes
            return product

        def many(weight: Tensor) -> Linear:
            return counted(many_rows(weight, precision))

        def few(weight: Tensor) -> Linear:
            return counted(few_rows(weight, precision, kernels))

        self._encoder = [
            _Block(weights.attention("encoder", i), weights.feed_forward("encoder", i), many)
            for i in range(shape.encoder_layers)
        ]
        self._decoder: list[tuple[_Block, _Cross]] = []
        cross = []
        for i in range(shape.decoder_layers):
            block = _Block(weights.attention("decoder", i), weights.feed_forward("decoder", i), few)
            attention = weights.cross_attention(i)
            self._decoder.append((block, _Cross(attention, few)))
            cross.append(torch.cat([attention.key, attention.value]))
        # Keys and values of all decoder layers in one product over the encoder's output.
        self._cross_in = many(torch.cat(cross))
        del cross
        self._encoder_norm = weights.final_norm("encoder").float()
        # The decoder's last norm takes the scale of its output with it.
        self._decoder_norm = weights.final_norm("decoder").float() * shape.head_scale
        self._head = counted(head(weights.head(), precision, kernels))
        self._encoder_buckets = weights.bias("encoder").float()
        self._decoder_buckets = weights.bias("decoder").float()
        self._encoder_shape = _Encoder(
            heads=shape.heads, width=shape.head_width, padded=padded_width(shape)
        )
        self._reach(512)
        self._inner = shape.heads * shape.head_width

    def encode(
        self, documents: Sequence[Sequence[int]], state: State, slots: Sequence[int]
    ) -> None:
        """Run the encoder and leave the documents' keys and values in their slots.

        Args:
            documents: input ids.
            state: where the slots are.
            slots: one for each document.
        """
        lengths = [len(document) for document in documents]
        self._reach(max(lengths))
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        # oneDNN makes a kernel for each number of rows it meets: let there be few.
        count = padded_rows(sum(lengths))
        ids = torch.zeros(count, dtype=torch.int32)
        ids[: sum(lengths)] = torch.tensor([i for document in documents for i in document])
        hidden = self._embedded(ids, count)
        mixed = torch.empty(count, self._inner)
        addend: Rows | None = None
        for block in self._encoder:
            joined = block.joined(self._add_norm(hidden, addend, block.norm))
            attended = self._output(count, self._inner)
            attended.values[sum(lengths) :] = 0
            self._kernels.t5_encoder_attention(
                ctypes.addressof(self._encoder_shape), *_input(joined), len(documents),
                starts.data_ptr(), mixed.data_ptr(), *_output(attended),
            )  # fmt: skip
            addend = self._feed_forward(hidden, block.out(attended), block)
        projected = self._cross_in(self._add_norm(hidden, addend, self._encoder_norm))
        places = torch.tensor(list(slots), dtype=torch.int32)
        values, format_, scales = _input(projected)
        stride = projected.values.shape[1]
        for layer, cache in enumerate(state.cross_caches):
            offset = layer * 2 * self._inner * projected.values.element_size()
            self._kernels.t5_store_cross(
                ctypes.addressof(cache), values + offset, format_, scales, stride, len(documents),
                starts.data_ptr(), places.data_ptr(),
            )  # fmt: skip

    def decode(self, rows: StepRows, state: State) -> Tensor:
        """One decoder step: writes the rows' keys and values.

        Returns:
            Logits, (rows, vocabulary), float32.
        """
        kernels, count = self._kernels, rows.count
        hidden = self._embedded(rows.tokens, count)
        mixed = torch.empty(count, self._inner)
        addend: Rows | None = None
        for layer, (block, cross) in enumerate(self._decoder):
            joined = block.joined(self._add_norm(hidden, addend, block.norm))
            attended = self._output(count, self._inner)
            kernels.t5_self_attention(
                ctypes.addressof(state.self_caches[layer]), *_input(joined), count,
                rows.lanes.data_ptr(), rows.positions.data_ptr(), mixed.data_ptr(),
                *_output(attended),
            )  # fmt: skip
            queries = cross.query(self._add_norm(hidden, block.out(attended), cross.norm))
            attended = self._output(count, self._inner)
            kernels.t5_cross_attention(
                ctypes.addressof(state.cross_caches[layer]), *_input(queries), count,
                rows.documents, rows.slots.data_ptr(), rows.sources.data_ptr(),
                rows.firsts.data_ptr(), mixed.data_ptr(), *_output(attended),
            )  # fmt: skip
            addend = self._feed_forward(hidden, cross.out(attended), block)
        return self._head(self._add_norm(hidden, addend, self._decoder_norm)).values

    def distance_bias(self, distances: int) -> Tensor:
        """Decoder self-attention bias, (heads, distances), farthest first."""
        back = torch.arange(distances - 1, -1, -1)
        found = buckets(self.shape, -back, bidirectional=False)
        return self._decoder_buckets[found].T.contiguous()

    def _reach(self, source: int) -> None:
        """Have the encoder's bias for documents this long: (heads, 2 * reach - 1), by offset."""
        if source > self._encoder_shape.reach:
            offsets = torch.arange(1 - source, source)
            found = buckets(self.shape, offsets, bidirectional=True)
            self._bias = self._encoder_buckets[found].T.contiguous()
            self._encoder_shape.bias, self._encoder_shape.reach = self._bias.data_ptr(), source

    def _embedded(self, ids: Tensor, count: int) -> Tensor:
        width = self.shape.width
        hidden = torch.empty(count, width)
        self._kernels.t5_embed(
            ids.data_ptr(), count, width, self._embedding.data_ptr(),
            FORMATS[self._embedding.dtype], hidden.data_ptr(),
        )  # fmt: skip
        return hidden

    def _feed_forward(self, hidden: Tensor, addend: Rows, block: _Block) -> Rows:
        """Add what attention gave, and return what is to be added next."""
        shape = self.shape
        inner = block.inner(self._add_norm(hidden, addend, block.inner_norm))
        count, width = inner.values.shape
        width //= 2 if shape.gated else 1
        positive = shape.activation == "relu" and not shape.gated
        active = self._output(count, width, positive=positive)
        values, format_, scales = _input(inner)
        self._kernels.t5_activate(
            values, format_, scales, count, width, _ACTIVATIONS[shape.activation], shape.gated,
            *_output(active),
        )  # fmt: skip
        return block.inner_out(active)

    def _add_norm(self, hidden: Tensor, addend: Rows | None, weight: Tensor) -> Rows:
        """hidden += addend, in place; returns its root mean square norm times `weight`."""
        count, width = hidden.shape
        normed = self._output(count, width)
        self._kernels.t5_add_norm(
            hidden.data_ptr(), *(_input(addend) if addend else (None, 0, None)), count, width,
            weight.data_ptr(), self.shape.epsilon, *_output(normed),
        )  # fmt: skip
        return normed

    def _output(self, count: int, width: int, *, positive: bool = False) -> Rows:
        """Room for rows that a product takes in."""
        values = torch.empty(count, width, dtype=self.precision.taken)
        if self.precision is not Precision.INT8:
            return Rows(values)
        return Rows(values, torch.empty(count), positive)


def padded_rows(tokens: int) -> int:
    """How many rows the encoder takes for so many tokens."""
    step = 16 if tokens <= 128 else 32 if tokens <= 512 else 64
    return -(-tokens // step) * step


def _input(rows: Rows) -> tuple[int, int, int | None]:
    scales = None if rows.scales is None else rows.scales.data_ptr()
    return rows.values.data_ptr(), FORMATS[rows.values.dtype], scales


def _output(rows: Rows) -> tuple[int, int | None, int]:
    values, format_, scales = _input(rows)
    return values, scales, format_
