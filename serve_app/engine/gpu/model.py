"""The T5 forward pass for inference (Raffel et al. 2020), apart from where its caches lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from serve_app.engine.weights import Attention, FeedForward, Shape, WeightSource, buckets

# Given queries of the rows' newest token, (rows, heads * head width), and for self-attention its
# keys and values behind them, a decoder's attention returns what the rows attended to, (rows, heads
# * head width).
SelfAttend = Callable[[int, Tensor], Tensor]
CrossAttend = Callable[[int, Tensor], Tensor]

# The score of a key that must not be seen. Not the dtype's lowest number: kernels multiply scores,
# and where no key is seen at all, all scores being infinite would make the sum none.
UNSEEN = -1e30
# Not cuDNN's: it compiles a plan for each new shape.
_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


class _Cross:
    def __init__(self, part: Attention) -> None:
        self.norm, self.query, self.out = part.norm, part.query, part.out


class _Layer:
    """A block with its matrices ready for use; query, key and value in one."""

    def __init__(self, attention: Attention, feed_forward: FeedForward) -> None:
        self.norm = attention.norm
        self.joined = torch.cat([attention.query, attention.key, attention.value])
        self.out = attention.out
        self.inner_norm = feed_forward.norm
        self.inner, self.inner_out = feed_forward.inner, feed_forward.out


class T5:
    """Weights and what is computed with them. All methods run without gradients."""

    def __init__(self, weights: WeightSource, shape: Shape) -> None:
        self.shape = shape
        self._activation = _ACTIVATIONS[shape.activation]
        self._embedding = weights.embedding()
        self._head = self._embedding if weights.tied else weights.head()
        self._encoder, self._decoder = (
            [
                _Layer(weights.attention(side, i), weights.feed_forward(side, i))
                for i in range(count)
            ]
            for side, count in (
                ("encoder", shape.encoder_layers),
                ("decoder", shape.decoder_layers),
            )
        )
        self._encoder_bias_by_bucket = weights.bias("encoder")
        self._decoder_bias_by_bucket = weights.bias("decoder")
        self._encoder_norm = weights.final_norm("encoder")
        self._decoder_norm = weights.final_norm("decoder")
        parts = [weights.cross_attention(i) for i in range(shape.decoder_layers)]
        self._cross = [_Cross(part) for part in parts]
        # Keys and values of all decoder layers in one matmul over the encoder's output.
        self._cross_in = torch.cat([w for part in parts for w in (part.key, part.value)])
        self._distance_bias = torch.empty(shape.heads, 0)
        self._outgrown: list[Tensor] = []

    @property
    def weight_bytes(self) -> int:
        """Size of the matrices."""
        blocks = [(b.joined, b.out, b.inner, b.inner_out) for b in self._encoder + self._decoder]
        others = [(part.query, part.out) for part in self._cross]
        tied = self._head is self._embedding
        single = (self._embedding, self._cross_in, *(() if tied else (self._head,)))
        return sum(w.nbytes for group in (*blocks, *others, single) for w in group)

    @property
    def step_bytes(self) -> int:
        """Size of the matrices that a decoder step reads."""
        layers = [(b.joined, b.out, b.inner, b.inner_out) for b in self._decoder]
        others = [(part.query, part.out) for part in self._cross]
        return self._head.nbytes + sum(w.nbytes for group in (*layers, *others) for w in group)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held in."""
        return self._embedding.dtype

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the encoder and project its output for the decoder.

        Args:
            ids: (documents, source), int64, padded at the end.
            mask: (documents, source), bool, true for real tokens.

        Returns:
            Cross-attention keys and values, (layers, 2, documents, heads, source, head width).
        """
        shape = self.shape
        documents, source = ids.shape
        bias = self._encoder_bias(source).masked_fill(~mask[:, None, None, :], UNSEEN)
        hidden = functional.embedding(ids, self._embedding)
        for layer in self._encoder:
            query, key, value = (
                functional.linear(self._norm(hidden, layer.norm), layer.joined)
                .view(documents, source, 3, shape.heads, shape.head_width)
                .permute(2, 0, 3, 1, 4)
            )
            with sdpa_kernel(_ATTENTION):
                mixed = functional.scaled_dot_product_attention(query, key, value, bias, scale=1.0)
            mixed = mixed.transpose(1, 2).reshape(documents, source, -1)
            hidden += functional.linear(mixed, layer.out)
            hidden += functional.linear(self._inner(hidden, layer), layer.inner_out)
        hidden = self._norm(hidden, self._encoder_norm)
        cross = functional.linear(hidden, self._cross_in).view(
            documents, source, shape.decoder_layers, 2, shape.heads, shape.head_width
        )
        return cross.permute(2, 3, 0, 4, 1, 5)

    def decode(self, ids: Tensor, attend: SelfAttend, cross: CrossAttend) -> Tensor:
        """One decoder step: the newest token of each row in, logits for the next one out.

        Args:
            ids: (rows,), int64.
            attend: self-attention of a layer, which also stores the new keys and values.
            cross: cross-attention of a layer.

        Returns:
            (rows, vocabulary), of the weights' dtype.
        """
        hidden = functional.embedding(ids, self._embedding)
        for index, (layer, part) in enumerate(zip(self._decoder, self._cross, strict=True)):
            joined = functional.linear(self._norm(hidden, layer.norm), layer.joined)
            # A residual is added by the product: of a small model's step every launch counts.
            hidden.addmm_(attend(index, joined), layer.out.T)
            normed = self._norm(hidden, part.norm)
            hidden.addmm_(cross(index, functional.linear(normed, part.query)), part.out.T)
            hidden.addmm_(self._inner(hidden, layer), layer.inner_out.T)
        hidden = self._norm(hidden, self._decoder_norm) * self.shape.head_scale
        return functional.linear(hidden, self._head)

    def distance_bias(self, distances: int) -> Tensor:
        """Decoder self-attention bias by how far back a key lies: (heads, at least `distances`)."""
        if self._distance_bias.shape[1] < distances:
            # CUDA graphs go on reading the old one from where it lies.
            self._outgrown.append(self._distance_bias)
            back = torch.arange(max(distances, 128), device=self.device)
            found = buckets(self.shape, -back, bidirectional=False)
            self._distance_bias = self._decoder_bias_by_bucket[found].T.contiguous()
        return self._distance_bias

    def _encoder_bias(self, source: int) -> Tensor:
        """(heads, source, source), from one row of biases by offset."""
        offsets = torch.arange(1 - source, source, device=self.device)
        found = buckets(self.shape, offsets, bidirectional=True)
        by_offset = self._encoder_bias_by_bucket[found]
        position = torch.arange(source, device=self.device)
        index = position[None, :] - position[:, None] + source - 1
        return by_offset[index].permute(2, 0, 1)

    def _inner(self, hidden: Tensor, layer: _Layer) -> Tensor:
        """The feed-forward layer but for its last product."""
        inner = functional.linear(self._norm(hidden, layer.inner_norm), layer.inner)
        if self.shape.gated:
            gate, linear = inner.chunk(2, -1)
            return self._activation(gate) * linear
        return self._activation(inner)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm, no mean taken off, in float32: one kernel on a GPU, not eight."""
        return functional.rms_norm(hidden, weight.shape, weight, self.shape.epsilon)
