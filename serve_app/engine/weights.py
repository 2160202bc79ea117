"""A checkpoint's shape and weights, from the Hugging Face layout (safetensors only)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from serve_app.engine.checkpoint import Checkpoint, CheckpointError

_RELU = ("relu", False)
_FEED_FORWARD = {  # config's feed_forward_proj -> (activation, gated)
    "relu": _RELU,
    "gated-gelu": ("gelu_new", True),
    "gelu": ("gelu", False),
    "gated-silu": ("silu", True),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a T5 looks like: v1.0 (ReLU, tied head), v1.1, FLAN and mT5 (gated GELU, own head)."""

    vocabulary: int
    width: int
    heads: int
    head_width: int
    encoder_layers: int
    decoder_layers: int
    buckets: int
    max_distance: int
    epsilon: float
    activation: str
    gated: bool
    head_scale: float  # on the decoder's output, before the head
    pad_id: int
    eos_id: int
    start_id: int


def read_shape(config: dict[str, Any]) -> Shape:
    """The shape that a `config.json` describes.

    Raises:
        CheckpointError: an activation that is not known.
    """
    projection = config.get("feed_forward_proj", "relu")
    if projection not in _FEED_FORWARD:
        raise CheckpointError(f"config.json: feed_forward_proj {projection!r} is not known")
    activation, gated = _FEED_FORWARD[projection]
    # As transformers 5 decides it: older T5 configs say it with `tie_word_embeddings`, mT5 never
    # scales.
    tied = config.get("tie_word_embeddings") is not False
    scaled = bool(config.get("scale_decoder_outputs", tied)) and config["model_type"] == "t5"
    start = config.get("decoder_start_token_id")
    pad = int(config.get("pad_token_id") or 0)
    return Shape(
        vocabulary=int(config["vocab_size"]),
        width=int(config["d_model"]),
        heads=int(config["num_heads"]),
        head_width=int(config["d_kv"]),
        encoder_layers=int(config["num_layers"]),
        decoder_layers=int(config.get("num_decoder_layers") or config["num_layers"]),
        buckets=int(config.get("relative_attention_num_buckets", 32)),
        max_distance=int(config.get("relative_attention_max_distance", 128)),
        epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
        activation=activation,
        gated=gated,
        head_scale=float(config["d_model"]) ** -0.5 if scaled else 1.0,
        pad_id=pad,
        eos_id=int(config.get("eos_token_id", 1)),
        start_id=pad if start is None else int(start),
    )


@dataclass(frozen=True, slots=True)
class Attention:
    """Weights of one attention, each (out, in)."""

    norm: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


@dataclass(frozen=True, slots=True)
class FeedForward:
    """Weights of one feed-forward layer; gate and linear of a gated one stacked in `inner`."""

    norm: Tensor
    inner: Tensor
    out: Tensor


class WeightSource:
    """Weights of a checkpoint, read one by one as they lie on disk.

    Each file is opened for each weight: a mapped file's pages count as the process' own for as long
    as it is open, and would double the memory that loading takes.

    Args:
        checkpoint: where they lie.
        shape: what it says of itself.
        device: where they go.
        dtype: what they are converted to; None leaves them as they are.

    Raises:
        CheckpointError: from any method: a weight is missing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: Shape,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._name = checkpoint.name
        self._shape = shape
        self._place: dict[str, Any] = {"device": device, "dtype": dtype}
        self._files: dict[str, Path] = {}
        for path in sorted(checkpoint.path.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))

    def embedding(self) -> Tensor:
        """(vocabulary, width)."""
        return self._get(
            "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
        )

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return "lm_head.weight" not in self._files

    def head(self) -> Tensor:
        """(vocabulary, width)."""
        return self.embedding() if self.tied else self._get("lm_head.weight")

    def attention(self, side: str, layer: int) -> Attention:
        """Self-attention of a layer of the `encoder` or `decoder`."""
        return self._attention(f"{side}.block.{layer}.layer.0", "SelfAttention")

    def cross_attention(self, layer: int) -> Attention:
        """Cross-attention of a decoder layer."""
        return self._attention(f"decoder.block.{layer}.layer.1", "EncDecAttention")

    def feed_forward(self, side: str, layer: int) -> FeedForward:
        """Feed-forward of a layer."""
        prefix = f"{side}.block.{layer}.layer.{2 if side == 'decoder' else 1}"
        name = f"{prefix}.DenseReluDense"
        inner = (
            torch.cat([self._get(f"{name}.wi_0.weight"), self._get(f"{name}.wi_1.weight")])
            if self._shape.gated
            else self._get(f"{name}.wi.weight")
        )
        return FeedForward(
            self._get(f"{prefix}.layer_norm.weight"), inner, self._get(f"{name}.wo.weight")
        )

    def bias(self, side: str) -> Tensor:
        """Relative attention bias, (buckets, heads)."""
        return self._get(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")

    def final_norm(self, side: str) -> Tensor:
        """(width,)."""
        return self._get(f"{side}.final_layer_norm.weight")

    def _attention(self, prefix: str, name: str) -> Attention:
        parts = [self._get(f"{prefix}.{name}.{part}.weight") for part in "qkvo"]
        return Attention(self._get(f"{prefix}.layer_norm.weight"), *parts)

    def _get(self, *names: str) -> Tensor:
        for name in names:
            if name in self._files:
                with safe_open(self._files[name], framework="pt") as file:
                    # A copy: what the file gives may be a view of its pages.
                    weight: Tensor = file.get_tensor(name)
                    return weight.to(**self._place, copy=True)
        raise CheckpointError(f"model {self._name!r} has no weight {names[0]}")


def buckets(shape: Shape, offset: Tensor, *, bidirectional: bool) -> Tensor:
    """T5's relative position buckets: exact for near keys, logarithmic for far ones.

    Args:
        shape: the model's.
        offset: key's position less query's, int64.
        bidirectional: whether keys behind the query count.
    """
    count = shape.buckets // 2 if bidirectional else shape.buckets
    distance = offset.abs() if bidirectional else (-offset).clamp(min=0)
    exact = count // 2
    ratio = torch.log(distance.float() / exact) / math.log(shape.max_distance / exact)
    far = exact + (ratio * (count - exact)).to(torch.long)
    bucket = torch.where(distance < exact, distance, far.clamp(max=count - 1))
    return bucket + (offset > 0) * count if bidirectional else bucket
