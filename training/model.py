"""The demo model's shape, and an initialization that can copy before it has learned anything.

Synopses are ten tokens long, so they say little about *where to look*: from a usual start, a small
model spends most of a two-core budget learning to attend to the source at all. A summarizer's
first skill is copying, and the circuit for it is known (Olsson et al. 2022, "In-context Learning
and Induction Heads"; Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention Layers"):
one encoder head writes each position's *previous* token into a subspace, the decoder's
cross-attention matches its current token against that subspace, and copies the token found there,
the successor. Here that circuit is written into the weights and training starts from it.
"""

from __future__ import annotations

import torch
from transformers import T5Config, T5ForConditionalGeneration

_PREVIOUS = 1  # relative-position bucket of offset -1 (bidirectional bucketing, T5)
_PREVIOUS_BIAS = 8.0
_MATCH = 0.6  # scale of query and key: a match gets a logit of about 57 * _MATCH**2
_COPY = 2.0  # how much louder the copied token is than the decoder's own
_QUIET = 0.2  # scale of every other write into the residual stream


def config(vocabulary: int) -> T5Config:
    """T5 v1.0: ReLU, tied embeddings. 11.6M parameters, 23 MB in float16."""
    return T5Config(
        vocab_size=vocabulary,
        d_model=320,
        d_kv=64,
        num_heads=5,
        d_ff=704,
        num_layers=6,
        num_decoder_layers=3,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def new_model(vocabulary: int, seed: int) -> T5ForConditionalGeneration:
    """A fresh model with the copying circuit in place."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(config(vocabulary))
    write_copy_circuit(model)
    return model


@torch.no_grad()
def write_copy_circuit(model: T5ForConditionalGeneration) -> None:
    """Write the induction circuit into `model`, in place."""
    shape = model.config
    width, head = shape.d_model, shape.d_kv
    for block in [*model.encoder.block, *model.decoder.block]:
        for layer in block.layer:
            name = next(
                n
                for n in ("SelfAttention", "EncDecAttention", "DenseReluDense")
                if hasattr(layer, n)
            )
            part = getattr(layer, name)
            (part.wo if name == "DenseReluDense" else part.o).weight.mul_(_QUIET)

    def orthonormal(rows: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(width, width))[0][:rows]

    seek, write = orthonormal(head), orthonormal(head)

    # Encoder, first layer, first head: look one token back, write it into the subspace `write`.
    first = model.encoder.block[0].layer[0].SelfAttention
    first.relative_attention_bias.weight[_PREVIOUS, 0] += _PREVIOUS_BIAS
    first.q.weight[:head] *= _QUIET
    first.v.weight[:head] = seek
    first.o.weight[:, :head] = write.T

    # Decoder, first layer, cross-attention: every head finds the position whose previous token is
    # the current one; the heads together carry the whole token over.
    cross = model.decoder.block[0].layer[1].EncDecAttention
    heads = shape.num_heads
    cross.q.weight[:] = (seek * _MATCH).repeat(heads, 1)
    cross.k.weight[:] = (write * _MATCH).repeat(heads, 1)
    carry = orthonormal(width)[: heads * head]
    cross.v.weight[:] = carry
    cross.o.weight[:] = carry.T * _COPY
