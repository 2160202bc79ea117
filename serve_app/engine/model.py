"""The T5 forward pass for inference (Raffel et al. 2020), apart from where its caches lie."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from serve_app.engine.linear import Linear
from serve_app.engine.weights import Attention, Layer, Shape, Stack, Weights

# Given queries, keys and values of the rows' newest token, (rows, heads * head width) each, a
# decoder's attention returns what the rows attended to, (rows, heads * head width).
SelfAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
CrossAttend = Callable[[int, Tensor], Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


class _Cross:
    def __init__(self, part: Attention) -> None:
        self.norm = part.norm
        self.query = Linear(part.query)
        self.out = Linear(part.out)


class _Layer:
    """A block with its matrices ready for use; query, key and value in one."""

    def __init__(self, layer: Layer) -> None:
        part = layer.self_attention
        self.norm = part.norm
        self.joined = Linear(torch.cat([part.query, part.key, part.value]))
        self.out = Linear(part.out)
        self.cross = _Cross(layer.cross) if layer.cross is not None else None
        self.inner_norm = layer.feed_forward.norm
        self.inner = Linear(layer.feed_forward.inner)
        self.inner_out = Linear(layer.feed_forward.out)


class _Stack:
    def __init__(self, stack: Stack) -> None:
        self.layers = [_Layer(layer) for layer in stack.layers]
        self.bias = stack.bias
        self.norm = stack.norm


class T5:
    """Weights and what is computed with them. All methods run without gradients."""

    def __init__(self, weights: Weights, shape: Shape) -> None:
        self.shape = shape
        self._activation = _ACTIVATIONS[shape.activation]
        self._embedding = weights.embedding
        self._encoder = _Stack(weights.encoder)
        self._decoder = _Stack(weights.decoder)
        # Keys and values of all decoder layers in one matmul over the encoder's output.
        cross = [layer.cross for layer in weights.decoder.layers if layer.cross is not None]
        self._cross_in = Linear(torch.cat([w for part in cross for w in (part.key, part.value)]))
        self._head = Linear(weights.head)
        self._distance_bias = torch.empty(shape.heads, 0)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held in."""
        return self._embedding.dtype

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the encoder and project its output for the decoder.

        Args:
            ids: (documents, source), int64, padded at the end.
            mask: (documents, source), bool, true for real tokens.

        Returns:
            Cross-attention keys, (layers, documents, heads, head width, source), and values,
            (layers, documents, heads, source, head width).
        """
        shape, stack = self.shape, self._encoder
        documents, source = ids.shape
        bias = self._encoder_bias(source) + _blocked(~mask)[:, None, None, :]
        hidden = functional.embedding(ids, self._embedding)
        for layer in stack.layers:
            query, key, value = (
                layer.joined(self._norm(hidden, layer.norm))
                .view(documents, source, 3, shape.heads, shape.head_width)
                .permute(2, 0, 3, 1, 4)
            )
            scores = query @ key.transpose(-1, -2) + bias
            mixed = torch.softmax(scores.float(), -1).to(value.dtype) @ value
            mixed = mixed.transpose(1, 2).reshape(documents, source, -1)
            hidden = hidden + layer.out(mixed)
            hidden = hidden + self._feed_forward(hidden, layer)
        hidden = self._norm(hidden, stack.norm)
        cross = self._cross_in(hidden).view(
            documents, source, shape.decoder_layers, 2, shape.heads, shape.head_width
        )
        return cross[:, :, :, 0].permute(2, 0, 3, 4, 1), cross[:, :, :, 1].permute(2, 0, 3, 1, 4)

    def decode(self, ids: Tensor, attend: SelfAttend, cross: CrossAttend) -> Tensor:
        """One decoder step: the newest token of each row in, logits for the next one out.

        Args:
            ids: (rows,), int64.
            attend: self-attention of a layer, which also stores the new keys and values.
            cross: cross-attention of a layer.

        Returns:
            (rows, vocabulary), float32.
        """
        stack = self._decoder
        hidden = functional.embedding(ids, self._embedding)
        for index, layer in enumerate(stack.layers):
            query, key, value = layer.joined(self._norm(hidden, layer.norm)).chunk(3, -1)
            mixed = attend(index, query, key, value)
            hidden = hidden + layer.out(mixed)
            part = layer.cross
            assert part is not None
            mixed = cross(index, part.query(self._norm(hidden, part.norm)))
            hidden = hidden + part.out(mixed)
            hidden = hidden + self._feed_forward(hidden, layer)
        hidden = self._norm(hidden, stack.norm) * self.shape.head_scale
        return self._head(hidden).float()

    def distance_bias(self, distances: int) -> Tensor:
        """Decoder self-attention bias by how far back a key lies: (heads, at least `distances`)."""
        if self._distance_bias.shape[1] < distances:
            back = torch.arange(max(distances, 128), device=self.device)
            buckets = self._bucket(-back, bidirectional=False)
            self._distance_bias = self._decoder.bias[buckets].T.contiguous()
        return self._distance_bias

    def _encoder_bias(self, source: int) -> Tensor:
        """(heads, source, source), from one row of biases by offset."""
        offsets = torch.arange(1 - source, source, device=self.device)
        by_offset = self._encoder.bias[self._bucket(offsets, bidirectional=True)]
        position = torch.arange(source, device=self.device)
        index = position[None, :] - position[:, None] + source - 1
        return by_offset[index].permute(2, 0, 1)

    def _bucket(self, offset: Tensor, *, bidirectional: bool) -> Tensor:
        """T5's relative position buckets: exact for near keys, logarithmic for far ones."""
        buckets = self.shape.buckets // 2 if bidirectional else self.shape.buckets
        distance = offset.abs() if bidirectional else (-offset).clamp(min=0)
        exact = buckets // 2
        ratio = torch.log(distance.float() / exact) / math.log(self.shape.max_distance / exact)
        far = exact + (ratio * (buckets - exact)).to(torch.long)
        bucket = torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
        return bucket + (offset > 0) * buckets if bidirectional else bucket

    def _feed_forward(self, hidden: Tensor, layer: _Layer) -> Tensor:
        inner = layer.inner(self._norm(hidden, layer.inner_norm))
        if self.shape.gated:
            gate, linear = inner.chunk(2, -1)
            inner = self._activation(gate) * linear
        else:
            inner = self._activation(inner)
        return layer.inner_out(inner)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm, no mean taken off, in float32."""
        wide = hidden.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.shape.epsilon)
        return scaled.to(weight.dtype) * weight


def _blocked(where: Tensor) -> Tensor:
    """Additive mask: the lowest float where true, else 0."""
    return torch.zeros(where.shape, device=where.device).masked_fill_(
        where, torch.finfo(torch.float32).min
    )
