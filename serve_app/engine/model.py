"""The T5 forward pass for inference (Raffel et al. 2020), apart from where its caches lie."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from serve_app.engine.weights import Attention, FeedForward, Shape, Stack, Weights

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


class T5:
    """Weights and what is computed with them. All methods run without gradients."""

    def __init__(self, weights: Weights, shape: Shape) -> None:
        self.shape = shape
        self._weights = weights
        self._activation = _ACTIVATIONS[shape.activation]
        self._encoder_in = _fused_inputs(weights.encoder)
        self._decoder_in = _fused_inputs(weights.decoder)
        # Keys and values of all decoder layers in one matmul over the encoder's output.
        cross = [layer.cross for layer in weights.decoder.layers if layer.cross is not None]
        self._cross_in = torch.cat([w for part in cross for w in (part.key, part.value)])
        self._distance_bias = torch.empty(shape.heads, 0)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held in."""
        return self._weights.embedding.dtype

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the encoder and project its output for the decoder.

        Args:
            ids: (documents, source), int64, padded at the end.
            mask: (documents, source), bool, true for real tokens.

        Returns:
            Cross-attention keys, (layers, documents, heads, head width, source), and values,
            (layers, documents, heads, source, head width).
        """
        shape, stack = self.shape, self._weights.encoder
        documents, source = ids.shape
        bias = self._encoder_bias(source) + _blocked(~mask)[:, None, None, :]
        hidden = functional.embedding(ids, self._weights.embedding)
        for index, layer in enumerate(stack.layers):
            normed = self._norm(hidden, layer.self_attention.norm)
            joined = functional.linear(normed, self._encoder_in[index])
            query, key, value = joined.view(
                documents, source, 3, shape.heads, shape.head_width
            ).permute(2, 0, 3, 1, 4)
            scores = query @ key.transpose(-1, -2) + bias
            mixed = torch.softmax(scores.float(), -1).to(value.dtype) @ value
            mixed = mixed.transpose(1, 2).reshape(documents, source, -1)
            hidden = hidden + functional.linear(mixed, layer.self_attention.out)
            hidden = hidden + self._feed_forward(hidden, layer.feed_forward)
        hidden = self._norm(hidden, stack.norm)
        cross = functional.linear(hidden, self._cross_in).view(
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
        stack = self._weights.decoder
        hidden = functional.embedding(ids, self._weights.embedding)
        for index, layer in enumerate(stack.layers):
            normed = self._norm(hidden, layer.self_attention.norm)
            query, key, value = functional.linear(normed, self._decoder_in[index]).chunk(3, -1)
            mixed = attend(index, query, key, value)
            hidden = hidden + functional.linear(mixed, layer.self_attention.out)
            part = layer.cross
            assert part is not None
            mixed = cross(index, functional.linear(self._norm(hidden, part.norm), part.query))
            hidden = hidden + functional.linear(mixed, part.out)
            hidden = hidden + self._feed_forward(hidden, layer.feed_forward)
        hidden = self._norm(hidden, stack.norm) * self.shape.head_scale
        return functional.linear(hidden, self._weights.head).float()

    def distance_bias(self, distances: int) -> Tensor:
        """Decoder self-attention bias by how far back a key lies: (heads, at least `distances`)."""
        if self._distance_bias.shape[1] < distances:
            back = torch.arange(max(distances, 128), device=self.device)
            buckets = self._bucket(-back, bidirectional=False)
            self._distance_bias = self._weights.decoder.bias[buckets].T.contiguous()
        return self._distance_bias

    def _encoder_bias(self, source: int) -> Tensor:
        """(heads, source, source), from one row of biases by offset."""
        offsets = torch.arange(1 - source, source, device=self.device)
        by_offset = self._weights.encoder.bias[self._bucket(offsets, bidirectional=True)]
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

    def _feed_forward(self, hidden: Tensor, part: FeedForward) -> Tensor:
        inner = functional.linear(self._norm(hidden, part.norm), part.inner)
        if self.shape.gated:
            gate, linear = inner.chunk(2, -1)
            inner = self._activation(gate) * linear
        else:
            inner = self._activation(inner)
        return functional.linear(inner, part.out)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm, no mean taken off, in float32."""
        wide = hidden.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.shape.epsilon)
        return scaled.to(weight.dtype) * weight


def _fused_inputs(stack: Stack) -> list[Tensor]:
    """Query, key and value of each layer in one matrix, (3 * heads * head width, width)."""

    def fused(part: Attention) -> Tensor:
        return torch.cat([part.query, part.key, part.value])

    return [fused(layer.self_attention) for layer in stack.layers]


def _blocked(where: Tensor) -> Tensor:
    """Additive mask: the lowest float where true, else 0."""
    return torch.zeros(where.shape, device=where.device).masked_fill_(
        where, torch.finfo(torch.float32).min
    )
