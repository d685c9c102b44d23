"""Addresses: where a tile of a [N, C, P] tensor lies in memory.

A tile is ``[BLOCK_C, BLOCK_N * BLOCK_P]``: channels by (sample, position). The samples and
positions of one channel are cut into chunks of ``BLOCK_N`` samples by ``BLOCK_P`` positions,
numbered sample-major. A dense tensor has one of two memory orders: channels in the middle, ``[N, C,
P]``, or channels last, ``[P, C]`` with N = 1 (`tritonnorm.problem.View` merges every layout into
one of them).
"""

import triton
import triton.language as tl


@triton.jit
def hint_fast_axis(C, P, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Tell the compiler that VEC divides the contiguous extent, which widens its accesses."""
    if CHANNELS_LAST:
        C = C // VEC * VEC
    else:
        P = P // VEC * VEC
    return C, P


@triton.jit
def columns_of(
    block, C, BLOCK_C: tl.constexpr, PLANE: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr
):
    """Of a block of WIDTH channels: its first column, all that it has room for, [BLOCK_C], and
    where those that are its own end."""
    if PLANE == 1:
        c0 = block * BLOCK_C
        return c0, c0 + tl.arange(0, BLOCK_C), C
    else:
        c0 = block * (WIDTH * PLANE)
        end = tl.minimum(C, c0 + WIDTH * PLANE) // VEC * VEC
        return c0, c0 + tl.arange(0, BLOCK_C), end


@triton.jit
def channels_of(c, end, C, PLANE: tl.constexpr):
    """Where the values of channels lie for columns: to load from, to store to (one column of each
    channel; beyond the last where c is not below `end`), and how many channels there are."""
    if PLANE == 1:
        return c, c, C
    else:
        first = (c < end) & (c % PLANE == 0)
        return c // PLANE, tl.where(first, c // PLANE, C // PLANE), C // PLANE


@triton.jit
def over_plane(v, PLANE: tl.constexpr, WIDTH: tl.constexpr):
    """For every column [BLOCK_C] the sum over all columns of its channel."""
    if PLANE == 1:
        return v
    else:
        channel = tl.arange(0, triton.next_power_of_2(WIDTH))
        own = channel[:, None] == (tl.arange(0, v.shape[0]) // PLANE)[None, :]
        sums = tl.sum(tl.where(own, v[None, :], 0.0), 1)
        return tl.sum(tl.where(own, sums[:, None], 0.0), 0)


@triton.jit
def chunk_origin(
    chunk, P, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """First sample and first position of a chunk."""
    if CHANNELS_LAST:  # one sample: no division
        return chunk * 0, (chunk + P * 0) * BLOCK_P  # int64 where P is, beyond 2^31 positions
    else:
        per_sample = (P - 1) // BLOCK_P + 1  # `cdiv` would pass 2^31 first
        return (chunk // per_sample) * BLOCK_N, (chunk % per_sample) * BLOCK_P


@triton.jit
def chunk_size(n0, p0, N, P, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Elements of a channel that a chunk covers; 0 beyond the last."""
    samples = tl.maximum(tl.minimum(N - n0, BLOCK_N), 0)
    return samples * tl.maximum(tl.minimum(P - p0, BLOCK_P), 0)


@triton.jit
def lanes(BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sample and position of every column of a tile, counted from the origin of its chunk."""
    k = tl.arange(0, BLOCK_N * BLOCK_P)
    return k // BLOCK_P, k % BLOCK_P


@triton.jit
def valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P):
    """Which elements of a chunk exist, [BLOCK_C, BLOCK_N * BLOCK_P]."""
    return (c < C)[:, None] & valid_columns(lane_n, lane_p, n0, p0, N, P)


@triton.jit
def valid_columns(lane_n, lane_p, n0, p0, N, P):
    """Which columns of a chunk exist, [1, BLOCK_N * BLOCK_P]."""
    return ((lane_n < N - n0) & (lane_p < P - p0))[None, :]


@triton.jit
def existing(c, C, lane_n, lane_p, n0, p0, N, P, WHOLE: tl.constexpr, EVEN: tl.constexpr):
    """`valid_columns` and `valid_lanes` of a chunk, with no comparison where everything exists:
    WHOLE says that of the columns, EVEN of the channels. The compiler leaves out a mask that is
    known to be true."""
    columns = tl.full([1, 1], True, tl.int1)
    if not WHOLE:
        columns = valid_columns(lane_n, lane_p, n0, p0, N, P)
    if WHOLE and EVEN:
        return columns, columns
    else:
        return columns, (c < C)[:, None] & columns


@triton.jit
def all_on_their_way(size):
    """What was loaded before is on its way before anything waits for a part of it.

    The compiler uses the first values that it loads before it has asked for the last, to save
    registers. But it moves nothing across a loop, not even this one, which never turns, as no size
    is negative.
    """
    for _ in range((tl.cast(size, tl.int32) < 0).to(tl.int32)):
        tl.debug_barrier()


@triton.jit
def dense_strides(C, P, CHANNELS_LAST: tl.constexpr):
    """``(s_n, s_c, s_p)`` of a dense tensor, int64."""
    wide_c = tl.cast(C, tl.int64)
    wide_p = tl.cast(P, tl.int64)
    if CHANNELS_LAST:
        return wide_c * wide_p, tl.full([], 1, tl.int64), wide_c
    else:
        return wide_c * wide_p, wide_p, tl.full([], 1, tl.int64)


@triton.jit
def lane_offsets(c, lane_n, lane_p, s_n, s_c, s_p):
    """Offsets of a tile from the origin of its chunk, int64 [BLOCK_C, BLOCK_N * BLOCK_P]."""
    return c[:, None] * s_c + (lane_n * s_n + lane_p * s_p)[None, :]


@triton.jit
def frame(
    c,
    C,
    P,
    xs_n,
    xs_c,
    xs_p,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """What the tiles of all chunks have in common, so that no chunk keeps addresses of its own.

    Columns of a tile (sample, position), then for dense tensors the strides of samples and
    positions and the offsets from a chunk's origin, then the same three for the input.
    """
    lane_n, lane_p = lanes(BLOCK_N, BLOCK_P)
    s_n, s_c, s_p = dense_strides(C, P, CHANNELS_LAST)
    lane = lane_offsets(c, lane_n, lane_p, s_n, s_c, s_p)
    if xs_n is None:
        return lane_n, lane_p, s_n, s_p, lane, s_n, s_p, lane
    else:
        x_n = tl.cast(xs_n, tl.int64)
        x_p = tl.cast(xs_p, tl.int64)
        x_lane = lane_offsets(c, lane_n, lane_p, x_n, tl.cast(xs_c, tl.int64), x_p)
        return lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane


@triton.jit
def bit_offsets(
    c0,
    n0,
    p0,
    N,
    C,
    P,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Offsets of the bytes of a tile in a bit mask, and which of them exist.

    The mask does not depend on how the tensor was tiled (`tritonnorm.problem.View.mask_room`).
    ``[N, C, P]`` has rows of P bits. ``[P, C]`` has for every eight channels a row with a byte for
    each position: what one strip of channels writes and reads are neighbours, however narrow it is.
    Rows begin at words of four bytes.

    The hints make each thread access the bytes of the elements that it has. Without them a thread
    gets neighbouring bytes, and every tile goes through shared memory, where warps wait for each
    other. As nothing is said to be divisible by more than 1, no access has more than a byte.
    """
    if CHANNELS_LAST:
        c = c0 + tl.arange(0, BLOCK_C // 8) * 8
        p = p0 + tl.arange(0, BLOCK_N * BLOCK_P)
        rows = (c // 8).to(tl.int64) * (tl.cdiv(P, 4) * 4)
        at = rows[:, None] + p[None, :]
        if BLOCK_C * BLOCK_N * BLOCK_P > 8:  # of one byte the compiler makes a scalar
            at = tl.max_contiguous(tl.multiple_of(at, [1, 1]), [BLOCK_C // 8, 1])
        return at, (c < C)[:, None] & ((p < P) & (n0 < N))[None, :]
    else:
        c = c0 + tl.arange(0, BLOCK_C)
        k = tl.arange(0, BLOCK_N * BLOCK_P // 8)
        n = n0 + k // (BLOCK_P // 8)
        p = p0 + k % (BLOCK_P // 8) * 8
        at = (n.to(tl.int64)[None, :] * C + c[:, None]) * (tl.cdiv(P, 32) * 4) + (p // 8)[None, :]
        if BLOCK_C * BLOCK_N * BLOCK_P > 8:
            at = tl.multiple_of(at, [1, 1])
        return at, (c < C)[:, None] & ((n < N) & (p < P))[None, :]


@triton.jit
def word_offsets(
    c0,
    n0,
    p0,
    N,
    C,
    P,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The same for words of 32 bits, for loops that are pipelined: nothing smaller is. A word has
    the bits of four positions and eight channels, or of 32 positions."""
    if CHANNELS_LAST:
        c = c0 + tl.arange(0, BLOCK_C // 8) * 8
        p = p0 + tl.arange(0, BLOCK_N * BLOCK_P // 4) * 4
        at = (c // 8).to(tl.int64)[:, None] * tl.cdiv(P, 4) + (p // 4)[None, :]
        return at, (c < C)[:, None] & ((p < P) & (n0 < N))[None, :]
    else:
        c = c0 + tl.arange(0, BLOCK_C)
        k = tl.arange(0, BLOCK_N * BLOCK_P // 32)
        n = n0 + k // (BLOCK_P // 32)
        p = p0 + k % (BLOCK_P // 32) * 32
        at = (n.to(tl.int64)[None, :] * C + c[:, None]) * tl.cdiv(P, 32) + (p // 32)[None, :]
        return at, (c < C)[:, None] & ((n < N) & (p < P))[None, :]


@triton.jit
def unpack_words(words, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Words that were loaded as a boolean tile [BLOCK_C, BLOCK_M]."""
    if CHANNELS_LAST:
        place = tl.arange(0, 8)[:, None] + tl.arange(0, 4)[None, :] * 8
        bits = words[:, None, :, None] >> place[None, :, None, :]
    else:
        bits = words[:, :, None] >> tl.arange(0, 32)[None, None, :]
    return tl.reshape(bits & 1, [BLOCK_C, BLOCK_M]) != 0


@triton.jit
def pack_bits(bits, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Pack a boolean tile [BLOCK_C, BLOCK_M] into bytes along the contiguous axis; bit i is element
    8j + i."""
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
