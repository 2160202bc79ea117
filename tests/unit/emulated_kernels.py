"""`attention.cu` without a GPU: as C++, its blocks one after the other, a block's threads in turns.

Threads change where they wait for each other, which all of a block do equally often. What a card
does at once, and how it rounds `expf`, does not show.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from serve_app.engine.gpu.attention import SOURCE, THREADS, StepAttention, options

_CARD = r"""
#include <cmath>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

struct Index { int x, y; };
static Index threadIdx, blockIdx, gridDim;
#define __device__
#define __global__
#define __shared__ static

static float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
static int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }

static const int ALL = %(threads)d;
static ucontext_t scheduler, threads[ALL];
static std::vector<char> stacks(ALL * (64 << 10));
static float passed[2][ALL];
static int parity[ALL];
static std::function<void()> body;

static void __syncthreads() {
    int mine = threadIdx.x;
    swapcontext(&threads[mine], &scheduler);
    threadIdx.x = mine;
}
static float __shfl_xor_sync(unsigned, float value, int mask) {
    int mine = threadIdx.x, side = parity[mine] ^= 1;
    passed[side][mine] = value;
    __syncthreads();
    return passed[side][mine ^ mask];
}
static bool over[ALL];
static void thread() { int mine = threadIdx.x; body(); over[mine] = true; }

static void run(int heads, int rows, std::function<void()> kernel) {
    body = kernel;
    gridDim = {heads, rows};
    for (int row = 0; row < rows; row++) for (int head = 0; head < heads; head++) {
        blockIdx = {head, row};
        for (int i = 0; i < ALL; i++) {
            getcontext(&threads[i]);
            threads[i].uc_stack.ss_sp = &stacks[i * (64 << 10)];
            threads[i].uc_stack.ss_size = 64 << 10;
            threads[i].uc_link = &scheduler;
            over[i] = false;
            makecontext(&threads[i], thread, 0);
        }
        for (bool going = true; going;) {
            going = false;
            for (int i = 0; i < ALL; i++) if (!over[i]) {
                threadIdx.x = i;
                swapcontext(&scheduler, &threads[i]);
                going = going || !over[i];
            }
        }
    }
}

#include "%(source)s"

#define ADDRESS(i, type) ((type*)arguments[i])
#define NUMBER(i) ((int)arguments[i])
extern "C" void run_cross(int heads, int rows, const long long* arguments) {
    run(heads, rows, [=] {
        cross(ADDRESS(0, Number), ADDRESS(1, Number), ADDRESS(2, Number), ADDRESS(3, long long),
              ADDRESS(4, Number), NUMBER(5), NUMBER(6), NUMBER(7));
    });
}
extern "C" void run_generated(int heads, int rows, const long long* arguments) {
    run(heads, rows, [=] {
        generated(ADDRESS(0, Number), ADDRESS(1, Number), ADDRESS(2, Number), ADDRESS(3, long long),
                  ADDRESS(4, long long), ADDRESS(5, Number), ADDRESS(6, Number), NUMBER(7),
                  NUMBER(8), NUMBER(9), NUMBER(10));
    });
}
"""


def build(folder: Path, head_width: int, dtype: torch.dtype) -> StepAttention:
    """The kernels on CPU tensors; `folder` keeps what is compiled."""
    code = folder / "emulated.cpp"
    code.write_text(_CARD % {"threads": THREADS, "source": SOURCE})
    made = folder / f"emulated-{head_width}-{dtype}.so"
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-o", str(made), str(code)]
    if not made.exists():
        subprocess.run([*command, *options(head_width, dtype)], check=True)
    library = ctypes.CDLL(str(made))

    def launch(name: str, blocks: tuple[int, int], arguments: Sequence[Tensor | int]) -> None:
        told = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
        getattr(library, f"run_{name}")(*blocks, (ctypes.c_longlong * len(told))(*told))

    return StepAttention(launch)
