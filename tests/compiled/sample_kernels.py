"""Kernels for the tests of the compile report and the fake driver."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, o_ptr, s_ptr, n, HW, C, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    s = tl.load(s_ptr + (tl.program_id(0) * B // HW) % C)
    x = tl.load(x_ptr + i, mask=m).to(tl.float32)
    tl.store(o_ptr + i, (x * s).to(o_ptr.dtype.element_ty), mask=m)


@triton.jit
def rows_kernel(x_ptr, o_ptr, HWv, V: tl.constexpr, B: tl.constexpr):
    HW = HWv * V
    i = tl.program_id(1) * B + tl.arange(0, B)
    p = tl.program_id(0).to(tl.int64) * HW + i
    tl.store(o_ptr + p, tl.load(x_ptr + p, mask=i < HW), mask=i < HW)


@triton.jit
def relu(x, slope):
    return tl.maximum(x, x * slope)


@triton.jit
def square(x, slope):
    return x * x


@triton.jit
def fused_kernel(
    x_ptrs,
    r_ptr,
    o_ptr,
    eps: tl.float64,
    ACT: tl.constexpr,
    PAIR: tl.constexpr,
    ARGS: tl.constexpr,
    DTYPE: tl.constexpr,
    FLAG: tl.constexpr,
    NONE: tl.constexpr,
    B: tl.constexpr,
):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.zeros([B], DTYPE)
    for k in tl.static_range(len(x_ptrs)):
        v += tl.load(x_ptrs[k] + i).to(DTYPE)
    if r_ptr is not None:
        v += tl.load(r_ptr + i)
    if NONE is None:
        v = ACT(v, ARGS[0])
    if FLAG:
        v = PAIR[1](v, ARGS[1])
    tl.store(o_ptr + i, v + eps.to(DTYPE))


@triton.jit
def broken_kernel(x_ptr, B: tl.constexpr):
    tl.store(x_ptr, tl.arange(0, B))
