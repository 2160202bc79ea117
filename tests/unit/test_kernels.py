"""The CPU kernels of every instruction set this machine has, against the formulas in torch."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from serve_app.engine import native
from serve_app.engine.cpu.linear import FORMATS, Precision, Rows, few_rows, head
from serve_app.engine.cpu.model import _Encoder
from serve_app.engine.cpu.state import _CrossCache, _SelfCache

FLOATS = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.int8: 3e-2}
HEADS, WIDTH, PADDED = 3, 24, 32
INNER = HEADS * WIDTH


@pytest.fixture(params=native.supported())
def kernels(request: pytest.FixtureRequest) -> ctypes.PyDLL:
    torch.manual_seed(3)
    return native.open_library(request.param)


def out(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, width, dtype=dtype), torch.zeros(rows)


def output(values: Tensor, scales: Tensor) -> tuple[int, int, int]:
    return values.data_ptr(), scales.data_ptr(), FORMATS[values.dtype]


def close(told: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    error = (told.float() - truth).abs().max()
    assert error <= CLOSE[dtype] * truth.abs().max(), error


def quantized(x: Tensor) -> Rows:
    scales = x.abs().amax(1) / 127
    return Rows((x / scales[:, None] + 128).round().to(torch.uint8), scales)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 13, 33])
@pytest.mark.parametrize("size", [(64, 32), (100, 64), (48, 20)])
def test_linear(kernels: ctypes.PyDLL, rows: int, size: tuple[int, int]) -> None:
    weight, x = torch.randn(size), torch.randn(rows, size[1])
    close(few_rows(weight, Precision.FLOAT32, kernels)(Rows(x)).values, x @ weight.T, x.dtype)
    short = x.bfloat16()
    told = head(weight, Precision.BFLOAT16, kernels)(Rows(short)).values
    assert told.dtype is torch.float32
    torch.testing.assert_close(told, short.float() @ weight.bfloat16().float().T, rtol=0, atol=1e-3)
    # The product of bytes is exact: what is lost was lost before.
    scales = weight.abs().amax(1) / 127
    whole = (weight / scales[:, None]).round()
    bytes_ = quantized(x)
    truth = (bytes_.values.double() - 128) @ whole.double().T
    truth = (truth * scales * bytes_.scales[:, None]).float()
    told = head(weight, Precision.INT8, kernels)(bytes_).values
    torch.testing.assert_close(told, truth, rtol=1e-5, atol=1e-5)
    positive = Rows((x.abs() * 60).clamp(0, 255).to(torch.uint8), torch.full((rows,), 0.5), True)
    truth = (positive.values.double() @ whole.double().T * scales * 0.5).float()
    told = head(weight, Precision.INT8, kernels)(positive).values
    torch.testing.assert_close(told, truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.uint8])
def test_residual_and_norm(kernels: ctypes.PyDLL, dtype: torch.dtype, to: torch.dtype) -> None:
    rows, width, epsilon = 5, 77, 1e-6
    hidden, addend = torch.randn(rows, width), torch.randn(rows, width).to(dtype)
    scales, weight = torch.rand(rows), torch.rand(width)
    summed = hidden + addend.float() * scales[:, None]
    truth = summed * torch.rsqrt(summed.pow(2).mean(1, keepdim=True) + epsilon) * weight
    values, out_scales = out(rows, width, to)
    kernels.t5_add_norm(
        hidden.data_ptr(), addend.data_ptr(), FORMATS[dtype], scales.data_ptr(), rows, width,
        weight.data_ptr(), epsilon, *output(values, out_scales),
    )  # fmt: skip
    torch.testing.assert_close(hidden, summed, rtol=1e-5, atol=1e-5)
    told = values.float()
    if to is torch.uint8:
        told = (told - 128) * out_scales[:, None]
        assert ((told - truth).abs() <= 0.51 * out_scales[:, None]).all()
        torch.testing.assert_close(out_scales, truth.abs().amax(1) / 127)
    else:
        close(told, truth, to)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("kind", "function"),
    [
        (0, torch.relu),
        (1, functional.gelu),
        (2, lambda x: functional.gelu(x, approximate="tanh")),
        (3, functional.silu),
    ],
    ids=["relu", "gelu", "gelu_new", "silu"],
)
def test_activations(kernels: ctypes.PyDLL, kind: int, function: object, gated: bool) -> None:
    rows, width = 4, 45
    inner = torch.randn(rows, width * (2 if gated else 1)) * 3
    scales = torch.rand(rows) + 0.5
    scaled = inner * scales[:, None]
    truth = function(scaled[:, :width])  # type: ignore[operator]
    if gated:
        truth = truth * scaled[:, width:]
    for to in (torch.float32, torch.uint8):
        values, out_scales = out(rows, width, to)
        kernels.t5_activate(
            inner.data_ptr(), 0, scales.data_ptr(), rows, width, kind, gated,
            *output(values, out_scales),
        )  # fmt: skip
        if to is torch.float32:
            close(values, truth, to)
        else:
            zero = 0 if kind == 0 and not gated else 128
            told = (values.float() - zero) * out_scales[:, None]
            assert ((told - truth).abs() <= 0.51 * out_scales[:, None] + 1e-6).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_encoder_attention_keeps_documents_apart(kernels: ctypes.PyDLL, dtype: torch.dtype) -> None:
    lengths, reach = [1, 7, 48, 50, 131], 140
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    joined = torch.randn(int(starts[-1]), 3 * INNER).to(dtype)
    bias = torch.randn(HEADS, 2 * reach - 1)
    encoder = _Encoder(heads=HEADS, width=WIDTH, padded=PADDED, bias=bias.data_ptr(), reach=reach)
    values, scales = out(len(joined), INNER, dtype)
    mixed = torch.zeros(len(joined), INNER)
    kernels.t5_encoder_attention(
        ctypes.addressof(encoder), joined.data_ptr(), FORMATS[dtype], None, len(lengths),
        starts.data_ptr(), mixed.data_ptr(), *output(values, scales),
    )  # fmt: skip
    for start, length in zip(starts.tolist(), lengths, strict=False):
        part = joined[start : start + length].float().view(length, 3, HEADS, WIDTH)
        query, key, value = part.permute(1, 2, 0, 3)
        position = torch.arange(length)
        offset = position[None] - position[:, None] + reach - 1
        truth = torch.softmax(query @ key.transpose(1, 2) + bias[:, offset], -1) @ value
        close(values[start : start + length], truth.transpose(0, 1).flatten(1), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_self_attention_follows_ancestry(kernels: ctypes.PyDLL, dtype: torch.dtype) -> None:
    lanes, capacity, distances = 4, 40, 50
    keys, values = torch.randn(2, lanes, HEADS, capacity, PADDED).to(dtype)
    ancestry = np.random.default_rng(0).integers(0, lanes, (lanes, capacity), dtype=np.int32)
    bias = torch.randn(HEADS, distances)
    cache = _SelfCache(
        keys=keys.data_ptr(), values=values.data_ptr(), ancestry=ancestry.ctypes.data,
        ancestry_stride=capacity, capacity=capacity, heads=HEADS, width=WIDTH, padded=PADDED,
        bias=bias.data_ptr(), distances=distances,
    )  # fmt: skip
    keys[..., WIDTH:] = values[..., WIDTH:] = 0
    row_lanes = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    positions = torch.tensor([0, 5, 17, 39], dtype=torch.int32)
    joined = torch.randn(len(row_lanes), 3 * INNER).to(dtype)
    told, scales = out(len(joined), INNER, dtype)
    mixed = torch.zeros(len(joined), INNER)
    kernels.t5_self_attention(
        ctypes.addressof(cache), joined.data_ptr(), FORMATS[dtype], None, len(joined),
        row_lanes.data_ptr(), positions.data_ptr(), mixed.data_ptr(), *output(told, scales),
    )  # fmt: skip
    for row, (lane, position) in enumerate(
        zip(row_lanes.tolist(), positions.tolist(), strict=True)
    ):
        query, key, value = joined[row].float().view(3, HEADS, WIDTH)
        at = [*ancestry[lane, :position].tolist(), lane]
        past = torch.arange(position + 1)
        mine = keys[at, :, past, :WIDTH].float(), values[at, :, past, :WIDTH].float()
        torch.testing.assert_close(mine[0][-1], key, rtol=0, atol=0)
        torch.testing.assert_close(mine[1][-1], value, rtol=0, atol=0)
        near = bias[:, distances - 1 - position :][:, : position + 1]
        shares = torch.softmax(torch.einsum("hw,phw->hp", query, mine[0]) + near, -1)
        close(told[row], torch.einsum("hp,phw->hw", shares, mine[1]).flatten(), dtype)


@pytest.mark.parametrize("kept", [*FLOATS, torch.int8])
def test_cross_attention(kernels: ctypes.PyDLL, kept: torch.dtype) -> None:
    dtype = torch.bfloat16 if kept is torch.int8 else kept
    lengths, counts, slots, capacity = [1, 30, 77, 128], [1, 4, 3, 7], [3, 0, 4, 1], 128
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    places = torch.tensor(slots, dtype=torch.int32)
    sources = torch.tensor(lengths, dtype=torch.int32)
    firsts = torch.tensor([0, *counts]).cumsum(0).int()
    keys, values = torch.zeros(2, 5, HEADS, capacity, PADDED).to(kept)
    each = [torch.full((5, HEADS, capacity), math.nan) for _ in range(3)]
    cache = _CrossCache(
        keys=keys.data_ptr(), values=values.data_ptr(), capacity=capacity, heads=HEADS, width=WIDTH,
        padded=PADDED,
    )  # fmt: skip
    if kept is torch.int8:
        cache.key_scales, cache.key_offsets, cache.value_scales = (e.data_ptr() for e in each)
    # Two layers' keys and values side by side; the second layer is tested.
    projected = torch.randn(int(starts[-1]), 4 * INNER).to(dtype)
    projected_scales = torch.rand(len(projected)) + 0.5
    kernels.t5_store_cross(
        ctypes.addressof(cache), projected.data_ptr() + 2 * INNER * projected.element_size(),
        FORMATS[dtype], projected_scales.data_ptr(), 4 * INNER, len(lengths), starts.data_ptr(),
        places.data_ptr(),
    )  # fmt: skip
    rows = int(firsts[-1])
    queries, scales = torch.randn(rows, INNER).to(dtype), torch.rand(rows) / WIDTH**0.5
    told, out_scales = out(rows, INNER, dtype)
    mixed = torch.zeros(rows, INNER)
    kernels.t5_cross_attention(
        ctypes.addressof(cache), queries.data_ptr(), FORMATS[dtype], scales.data_ptr(), rows,
        len(lengths), places.data_ptr(), sources.data_ptr(), firsts.data_ptr(), mixed.data_ptr(),
        *output(told, out_scales),
    )  # fmt: skip
    for document, length in enumerate(lengths):
        part = slice(int(starts[document]), int(starts[document + 1]))
        both = projected[part, 2 * INNER :].float() * projected_scales[part, None]
        key, value = both.view(length, 2, HEADS, WIDTH).permute(1, 2, 0, 3)
        mine = slice(int(firsts[document]), int(firsts[document + 1]))
        query = (queries[mine].float() * scales[mine, None]).view(-1, HEADS, WIDTH).transpose(0, 1)
        truth = torch.softmax(query @ key.transpose(1, 2), -1) @ value
        close(told[mine], truth.transpose(0, 1).flatten(1), kept)


@pytest.mark.parametrize(
    ("source", "tokens", "wanted", "told"),
    [
        ([3, 4, 5, 6, 7, 1], [0, 4, 5], 3, ([6, 7, 1], 2)),
        ([3, 4, 5, 6, 4, 5, 8, 1], [0, 4, 5], 1, ([8], 2)),  # the latest of equally long runs
        ([3, 4, 5, 6, 9, 5, 8, 1], [0, 4, 5], 1, ([6], 2)),  # but a longer run before it
        ([3, 4, 1], [0, 9, 8, 7, 9], 2, ([8, 7], 1)),  # in what has been said so far
        ([3, 4, 1], [0, 9], 2, ([], 0)),
        ([3, 4, 1], [0, 1], 2, ([], 0)),  # nothing comes behind the end
        ([2, 2, 2, 2, 2, 2, 2, 1], [2, 2, 2, 2, 2, 2], 8, ([1], 4)),  # runs count up to four
    ],
)
def test_what_follows_is_looked_up(
    kernels: ctypes.PyDLL,
    source: list[int],
    tokens: list[int],
    wanted: int,
    told: tuple[list[int], int],
) -> None:
    first, second = np.array(source, np.int32), np.array(tokens, np.int32)
    to, run = np.zeros(wanted, np.int32), ctypes.c_int32()
    count = kernels.t5_propose(
        first.ctypes.data, len(first), second.ctypes.data, len(second), 4, wanted, to.ctypes.data,
        ctypes.addressof(run),
    )  # fmt: skip
    assert (to[:count].tolist(), run.value) == told
