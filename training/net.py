"""T5 v1.0 for fast training: fused matrices, stacked by kind so that Muon sees few, large groups.

Numerically `transformers`' T5 apart from one rescaling: queries are multiplied by sqrt(head width)
here and divided by it in the attention, which keeps their matrix on the scale of the others.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config

_EPSILON = 1e-6


def relative_buckets(queries: int, keys: int, bidirectional: bool, config: T5Config) -> Tensor:
    """(queries, keys) int64: T5's relative-position buckets (Raffel et al. 2020, section 2.1)."""
    distance = torch.arange(keys)[None] - torch.arange(queries)[:, None]
    count = config.relative_attention_num_buckets
    base = torch.zeros_like(distance)
    if bidirectional:
        count //= 2
        base = (distance > 0).long() * count
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = count // 2
    far = torch.log(distance.clamp(min=1).float() / exact)
    far = far / math.log(config.relative_attention_max_distance / exact) * (count - exact)
    large = (exact + far.long()).clamp(max=count - 1)
    return base + torch.where(distance < exact, distance, large)


class Net(nn.Module):
    """The model in training.

    Stacked parameters have the layer first: `encoder_qkv` is (layers, 3, width, width), and so on;
    matrices are (out, in) as in `nn.Linear`.
    """

    def __init__(self, config: T5Config, dropout: float = 0.1) -> None:
        super().__init__()
        self.config, self.dropout = config, dropout
        width, inner, heads = config.d_model, config.d_ff, config.num_heads
        if heads * config.d_kv != width:
            raise ValueError(f"heads * d_kv must be d_model, {heads} * {config.d_kv} != {width}")
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, width))
        layers = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
        for side, count in layers.items():
            shapes = {
                "qkv": (count, 3, width, width),
                "out": (count, width, width),
                "wi": (count, inner, width),
                "wo": (count, width, inner),
                "norms": (count, 2 if side == "encoder" else 3, width),
                "final": (width,),
                "bias": (config.relative_attention_num_buckets, heads),
            }
            for name, shape in shapes.items():
                setattr(self, f"{side}_{name}", nn.Parameter(torch.empty(shape)))
        count = layers["decoder"]
        self.cross_q = nn.Parameter(torch.empty(count, width, width))
        self.cross_kv = nn.Parameter(torch.empty(count, 2, width, width))
        self.cross_out = nn.Parameter(torch.empty(count, width, width))
        self._buckets: dict[tuple[int, int, bool, torch.device], Tensor] = {}

    def matrices(self) -> list[nn.Parameter]:
        """The stacked matrices, for Muon; all but embeddings, biases and norms."""
        names = ("qkv", "out", "wi", "wo", "cross_q", "cross_kv")
        return [p for name, p in self.named_parameters() if name.endswith(names)]

    def _bias(self, side: str, size: int, dtype: torch.dtype) -> Tensor:
        table = cast(Tensor, getattr(self, f"{side}_bias"))
        key = (size, size, side == "encoder", table.device)
        if key not in self._buckets:
            buckets = relative_buckets(size, size, side == "encoder", self.config)
            self._buckets[key] = buckets.to(table.device)
        return functional.embedding(self._buckets[key], table).permute(2, 0, 1)[None].to(dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        heads = self.config.num_heads

        def split(x: Tensor) -> Tensor:
            return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

        out = functional.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask)
        return out.transpose(1, 2).reshape(q.shape)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits, (batch, target, vocabulary), of `target` (batch, target) int64 given `source`
        (batch, source) int64; 0 is padding in both, and what the decoder begins with.
        """
        width = self.config.d_model
        dtype = torch.bfloat16 if source.is_cuda else self.embedding.dtype
        weights = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return functional.rms_norm(x, (width,), weight, _EPSILON)

        def feed(x: Tensor, weight: Tensor, wi: Tensor, wo: Tensor) -> Tensor:
            inner = functional.relu(norm(x, weight) @ wi.T)
            return x + self._drop(self._drop(inner) @ wo.T)

        padding = torch.zeros(source.shape, dtype=dtype, device=source.device)
        padding = padding.masked_fill(source == 0, -1e4)[:, None, None]
        mask = self._bias("encoder", source.shape[1], dtype) + padding
        x = self._drop(functional.embedding(source, weights["embedding"]))
        names = ("qkv", "out", "wi", "wo", "norms")
        for qkv, out, wi, wo, norms in zip(
            *(weights[f"encoder_{n}"].unbind(0) for n in names), strict=True
        ):
            joined = norm(x, norms[0]) @ qkv.flatten(0, 1).T
            x = x + self._drop(self._attend(*joined.chunk(3, dim=-1), mask) @ out.T)
            x = feed(x, norms[1], wi, wo)
        encoded = self._drop(norm(x, weights["encoder_final"]))

        size = target.shape[1]
        ahead = torch.full((size, size), -1e4, dtype=dtype, device=source.device).triu(1)
        causal = (self._bias("decoder", size, dtype) + ahead).expand(len(target), -1, -1, -1)
        across = padding.expand(-1, self.config.num_heads, size, -1)
        begun = functional.pad(target, (1, 0))[:, :-1]
        x = self._drop(functional.embedding(begun, weights["embedding"]))
        for qkv, out, wi, wo, norms, cross_q, cross_kv, cross_out in zip(
            *(weights[f"decoder_{n}"].unbind(0) for n in names),
            *(weights[n].unbind(0) for n in ("cross_q", "cross_kv", "cross_out")),
            strict=True,
        ):
            joined = norm(x, norms[0]) @ qkv.flatten(0, 1).T
            x = x + self._drop(self._attend(*joined.chunk(3, dim=-1), causal) @ out.T)
            keys, values = (encoded @ cross_kv.flatten(0, 1).T).chunk(2, dim=-1)
            query = norm(x, norms[1]) @ cross_q.T
            x = x + self._drop(self._attend(query, keys, values, across) @ cross_out.T)
            x = feed(x, norms[2], wi, wo)
        x = self._drop(norm(x, weights["decoder_final"]))
        return (x * width**-0.5) @ weights["embedding"].T


def _layers(config: T5Config) -> dict[str, list[tuple[str, float]]]:
    """Where each stacked parameter's parts stand in `transformers`, in order, and their factors."""
    scale = config.d_kv**0.5
    names: dict[str, list[tuple[str, float]]] = {"embedding": [("shared.weight", 1.0)]}
    for side, count in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        last = 1 if side == "encoder" else 2
        blocks = [f"{side}.block.{i}.layer." for i in range(count)]
        names |= {
            f"{side}_qkv": [
                (f"{block}0.SelfAttention.{part}.weight", scale if part == "q" else 1.0)
                for block in blocks
                for part in "qkv"
            ],
            f"{side}_out": [(f"{block}0.SelfAttention.o.weight", 1.0) for block in blocks],
            f"{side}_wi": [(f"{block}{last}.DenseReluDense.wi.weight", 1.0) for block in blocks],
            f"{side}_wo": [(f"{block}{last}.DenseReluDense.wo.weight", 1.0) for block in blocks],
            f"{side}_norms": [
                (f"{block}{i}.layer_norm.weight", 1.0) for block in blocks for i in range(last + 1)
            ],
            f"{side}_final": [(f"{side}.final_layer_norm.weight", 1.0)],
            f"{side}_bias": [
                (f"{blocks[0]}0.SelfAttention.relative_attention_bias.weight", 1.0),
            ],
        }
    cross = [
        f"decoder.block.{i}.layer.1.EncDecAttention." for i in range(config.num_decoder_layers)
    ]
    names["cross_q"] = [(f"{block}q.weight", scale) for block in cross]
    names["cross_kv"] = [(f"{block}{part}.weight", 1.0) for block in cross for part in "kv"]
    names["cross_out"] = [(f"{block}o.weight", 1.0) for block in cross]
    return names


@torch.no_grad()
def from_transformers(net: Net, state: dict[str, Tensor]) -> Net:
    """Fill `net` with the weights of a `T5ForConditionalGeneration`'s state dict; returns it."""
    parameters = dict(net.named_parameters())
    for name, parts in _layers(net.config).items():
        stacked = torch.stack([state[part] * factor for part, factor in parts])
        parameters[name].copy_(stacked.view(parameters[name].shape))
    return net


def to_transformers(state: dict[str, Tensor], config: T5Config) -> dict[str, Tensor]:
    """A net's state dict in `transformers`' names, tied weights once."""
    found: dict[str, Tensor] = {}
    for name, parts in _layers(config).items():
        tensor = state[name].float()
        pieces = tensor.view(len(parts), -1, tensor.shape[-1])
        for (part, factor), piece in zip(parts, pieces, strict=True):
            flat = part.endswith("norm.weight")
            found[part] = (piece / factor).reshape(-1) if flat else piece / factor
    return found
