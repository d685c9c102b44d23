"""Addresses: where a tile of a [N, C, P] tensor lies in memory.

A tile is ``[BLOCK_C, BLOCK_N * BLOCK_P]``: channels by (sample, position). The samples and positions of
one channel are cut into chunks of ``BLOCK_N`` samples by ``BLOCK_P`` positions, numbered sample-major.
A dense tensor has one of two memory orders: channels in the middle, ``[N, C, P]``, or channels last,
``[P, C]`` with N = 1 (`tritonnorm.problem.View` merges every layout into one of them).
"""

import triton
import triton.language as tl


@triton.jit
def hint_fast_axis(C, P, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Tell the compiler that VEC divides the extent of the contiguous axis, which widens its accesses."""
    if CHANNELS_LAST:
        C = C // VEC * VEC
    else:
        P = P // VEC * VEC
    return C, P


@triton.jit
def chunk_index(
    chunk,  # number of the chunk in its channel
    N,
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sample and position of every column of a chunk, which columns exist, and how many do."""
    per_sample = tl.cdiv(P, BLOCK_P)
    n0 = (chunk // per_sample) * BLOCK_N
    p0 = (chunk % per_sample) * BLOCK_P
    k = tl.arange(0, BLOCK_N * BLOCK_P)
    n = n0 + k // BLOCK_P
    p = p0 + k % BLOCK_P
    count = tl.minimum(N - n0, BLOCK_N) * tl.minimum(P - p0, BLOCK_P)
    return n, p, (n < N) & (p < P), count


@triton.jit
def dense_offsets(c, n, p, C, P, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile of a dense tensor, int64 [BLOCK_C, BLOCK_N * BLOCK_P]."""
    if CHANNELS_LAST:
        return p.to(tl.int64)[None, :] * C + c[:, None]
    else:
        return (n.to(tl.int64)[None, :] * C + c[:, None]) * P + p[None, :]


@triton.jit
def input_offsets(c, n, p, dense, s_n, s_c, s_p):
    """Offsets of a tile of the input: ``dense`` when it has no strides of its own (s_n is None)."""
    if s_n is None:
        return dense
    else:
        rows = n.to(tl.int64) * s_n + p.to(tl.int64) * s_p
        return c.to(tl.int64)[:, None] * s_c + rows[None, :]


@triton.jit
def bit_offsets(
    c0,
    chunk,
    N,
    C,
    P,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Offsets and validity of the bytes of a tile of a bit mask.

    The mask has the rows of the tensor (``[N, C]`` rows of P bits, or ``[P]`` rows of C bits), each padded
    to whole bytes, so that it does not depend on how the tensor was tiled.
    """
    per_sample = tl.cdiv(P, BLOCK_P)
    n0 = (chunk // per_sample) * BLOCK_N
    p0 = (chunk % per_sample) * BLOCK_P
    if CHANNELS_LAST:
        c = c0 + tl.arange(0, BLOCK_C // 8) * 8
        p = p0 + tl.arange(0, BLOCK_N * BLOCK_P)
        offsets = p.to(tl.int64)[None, :] * tl.cdiv(C, 8) + (c // 8)[:, None]
        return offsets, (c < C)[:, None] & (p < P)[None, :]
    else:
        c = c0 + tl.arange(0, BLOCK_C)
        k = tl.arange(0, BLOCK_N * BLOCK_P // 8)
        n = n0 + k // (BLOCK_P // 8)
        p = p0 + k % (BLOCK_P // 8) * 8
        offsets = (n.to(tl.int64)[None, :] * C + c[:, None]) * tl.cdiv(P, 8) + (p // 8)[None, :]
        return offsets, (c < C)[:, None] & ((n < N) & (p < P))[None, :]


@triton.jit
def pack_bits(bits, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Pack a boolean tile [BLOCK_C, BLOCK_M] into bytes along the contiguous axis; bit i is element 8j + i."""
    place = tl.arange(0, 8)
    if CHANNELS_LAST:
        grouped = tl.reshape(bits.to(tl.int32), [BLOCK_C // 8, 8, BLOCK_M])
        return tl.sum(grouped << place[None, :, None], 1).to(tl.uint8)
    else:
        grouped = tl.reshape(bits.to(tl.int32), [BLOCK_C, BLOCK_M // 8, 8])
        return tl.sum(grouped << place[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The inverse of `pack_bits`: bytes to a boolean tile [BLOCK_C, BLOCK_M]."""
    place = tl.arange(0, 8)
    if CHANNELS_LAST:
        bits = packed.to(tl.int32)[:, None, :] >> place[None, :, None]
    else:
        bits = packed.to(tl.int32)[:, :, None] >> place[None, None, :]
    return tl.reshape(bits & 1, [BLOCK_C, BLOCK_M]) != 0
