"""A checkpoint's shape and weights, from the Hugging Face layout (safetensors only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
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


@dataclass(frozen=True, slots=True)
class Layer:
    """One block; `cross` in the decoder only."""

    self_attention: Attention
    cross: Attention | None
    feed_forward: FeedForward


@dataclass(frozen=True, slots=True)
class Stack:
    """Encoder or decoder. `bias` is the relative attention bias, (buckets, heads)."""

    layers: list[Layer]
    bias: Tensor
    norm: Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a T5. `head` is `embedding` itself where they are tied."""

    embedding: Tensor
    head: Tensor
    encoder: Stack
    decoder: Stack


def load_weights(checkpoint: Checkpoint, shape: Shape, device: str, dtype: torch.dtype) -> Weights:
    """Read the weights of a checkpoint.

    Raises:
        CheckpointError: a weight is missing.
    """
    raw: dict[str, Tensor] = {}
    for path in sorted(checkpoint.path.glob("*.safetensors")):
        raw.update(load_file(path))

    def get(*names: str) -> Tensor:
        for name in names:
            if name in raw:
                return raw[name].to(device=device, dtype=dtype)
        raise CheckpointError(f"model {checkpoint.name!r} has no weight {names[0]}")

    def attention(prefix: str, name: str) -> Attention:
        parts = [get(f"{prefix}.{name}.{part}.weight") for part in "qkvo"]
        return Attention(get(f"{prefix}.layer_norm.weight"), *parts)

    def feed_forward(prefix: str) -> FeedForward:
        name = f"{prefix}.DenseReluDense"
        inner = (
            torch.cat([get(f"{name}.wi_0.weight"), get(f"{name}.wi_1.weight")])
            if shape.gated
            else get(f"{name}.wi.weight")
        )
        return FeedForward(get(f"{prefix}.layer_norm.weight"), inner, get(f"{name}.wo.weight"))

    def stack(side: str, count: int) -> Stack:
        decodes = side == "decoder"
        layers = []
        for index in range(count):
            prefix = f"{side}.block.{index}.layer"
            layers.append(
                Layer(
                    attention(f"{prefix}.0", "SelfAttention"),
                    attention(f"{prefix}.1", "EncDecAttention") if decodes else None,
                    feed_forward(f"{prefix}.{2 if decodes else 1}"),
                )
            )
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return Stack(layers, get(bias), get(f"{side}.final_layer_norm.weight"))

    embedding = get("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    head = get("lm_head.weight") if "lm_head.weight" in raw else embedding
    return Weights(
        embedding,
        head,
        stack("encoder", shape.encoder_layers),
        stack("decoder", shape.decoder_layers),
    )
