"""Batch norm over the valid positions of padded sequences. Padding is neither read nor counted.

The input is ``[N, C, L]`` or ``[N, L, C]`` in memory, the mask one byte for each of the N * L
positions. Forward: partial moments per split -> combine -> apply. Backward: partial sums ->
combine -> gradients. As in `split`, but how many values a channel has is known only on the GPU: it
is counted with the moments and kept for backward, and the host never waits for it. A tile that is
all padding costs its mask; outputs and gradients of padding are stored as zero.
"""

import triton
import triton.language as tl

from . import _body as body
from . import _epilogue as epilogue
from . import _moments as moments
from . import _tile as tile


@triton.jit
def kept_positions(keep_ptr, lane_n, lane_p, n0, p0, N, P):
    """Which positions of a chunk are valid, [BLOCK_N * BLOCK_P], and how many."""
    inside = (lane_n < N - n0) & (lane_p < P - p0)
    at = (n0 + lane_n).to(tl.int64) * P + (p0 + lane_p)
    kept = tl.load(keep_ptr + at, mask=inside, other=0) != 0
    return kept, tl.sum(kept.to(tl.int32), 0)


@triton.jit
def readable(c, C, kept, some, valid, CHANNELS_LAST: tl.constexpr):
    """What of a tile to load. Along the contiguous axis a mask of single positions would cut wide
    loads into elements, so there a tile is loaded whole or not at all, and padding is dropped in
    registers."""
    if CHANNELS_LAST:
        return (c < C)[:, None] & kept[None, :]
    else:
        return valid & (some > 0)


@triton.jit(do_not_specialize=["PER_SPLIT", "CHUNKS"])
def masked_moments_kernel(
    x_ptr,  # [N, C, P] dense
    keep_ptr,  # uint8 [N, P], 0 is padding
    partial_ptr,  # [3, SPLITS, C] out: count, mean, centred second moment
    N,
    C,
    P,
    PER_SPLIT,  # chunks of a split
    CHUNKS,  # chunks of a channel
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Moments of the valid positions of one chunk range of one channel block."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane_n, lane_p, s_n, s_p, lane, _, _, _ = tile.frame(
        c, C, P, None, None, None, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    count = tl.zeros([], ACC)
    base = tl.zeros([BLOCK_C], ACC)
    total = tl.zeros([BLOCK_C], ACC)
    m2 = tl.zeros([BLOCK_C], ACC)
    first = tl.program_id(1) * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, CHUNKS)
    for run in range(first, last, moments.RUN):
        size, pivot, sums, squares = moments.begin_run(BLOCK_C, BLOCK_N * BLOCK_P, ACC)
        for chunk in range(run, tl.minimum(run + moments.RUN, last)):
            n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            kept, some = kept_positions(keep_ptr, lane_n, lane_p, n0, p0, N, P)
            if some > 0:
                valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
                reads = readable(c, C, kept, some, valid, CHANNELS_LAST)
                x = tl.load(x_ptr + (n0 * s_n + p0 * s_p) + lane, mask=reads, other=0.0).to(ACC)
                if size == 0.0:
                    pivot = moments.pivot(x, kept[None, :], some.to(ACC))
                sums, squares = moments.add_tile(sums, squares, x, pivot[:, None], kept[None, :])
                size += some.to(ACC)
        square = tl.sum(moments.settled(squares, moments.exist(N, C, P)), 1)
        count, base, total, m2 = moments.merge_run(
            count, base, total, m2, size, pivot, tl.sum(sums, 1), square
        )
    mean = base + total / tl.maximum(count, 1.0)
    plane = tl.num_programs(1).to(tl.int64) * C
    row = partial_ptr + tl.program_id(1).to(tl.int64) * C + c
    tl.store(row, tl.zeros([BLOCK_C], ACC) + count, mask=c < C)
    tl.store(row + plane, mean, mask=c < C)
    tl.store(row + 2 * plane, m2, mask=c < C)


@triton.jit(do_not_specialize=["SPLITS"])
def combine_masked_moments_kernel(
    partial_ptr,  # [3, SPLITS, C]
    mean_ptr,  # [C] out
    rstd_ptr,  # [C] out
    count_ptr,  # [1] out: valid positions
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    counter_ptr,  # [] int64 or None
    eps: tl.float64,
    momentum: tl.float64,
    C,
    SPLITS,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the moments of all splits. Fewer than two positions leave the running statistics and
    the counter as they are: they have no variance."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    plane = tl.cast(SPLITS, tl.int64) * C
    count = tl.zeros([], ACC)
    mean = tl.zeros([BLOCK_C], ACC)
    m2 = tl.zeros([BLOCK_C], ACC)
    for s0 in range(0, SPLITS, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < SPLITS)[:, None] & (c < C)[None, :]
        at = partial_ptr + s.to(tl.int64)[:, None] * C + c[None, :]
        # All channels have the same positions, so the first one's counts are everybody's.
        sizes = tl.load(partial_ptr + s.to(tl.int64) * C, mask=s < SPLITS, other=0.0)
        size = tl.sum(sizes, 0)
        if size > 0:
            means = tl.load(at + plane, mask=valid, other=0.0)
            weighted = moments.settled(sizes[:, None] * means, C + SPLITS > 0)
            centre = tl.sum(weighted, 0) / size
            delta = tl.where(valid, means - centre[None, :], 0.0)
            spread = tl.load(at + 2 * plane, mask=valid, other=0.0)
            spread = tl.sum(spread + sizes[:, None] * delta * delta, 0)
            count, mean, m2 = moments.merge_means(count, mean, m2, size, centre, spread)
    rstd = 1.0 / tl.sqrt(m2 / tl.maximum(count, 1.0) + tl.full([], eps, ACC))
    if tl.program_id(0) == 0:
        tl.store(count_ptr, count)
    if count > 1:
        moments.store_statistics(
            c, mean, m2, rstd, count, C, mean_ptr, rstd_ptr,
            running_mean_ptr, running_var_ptr, counter_ptr, momentum, CUMULATIVE,
        )  # fmt: skip
    else:
        tl.store(mean_ptr + c, mean, mask=c < C)
        tl.store(rstd_ptr + c, rstd, mask=c < C)


@triton.jit(do_not_specialize=["PER_SPLIT", "CHUNKS"])
def masked_apply_kernel(
    x_ptr,  # [N, C, P] dense
    keep_ptr,  # uint8 [N, P]
    y_ptr,  # [N, C, P] out, dense
    mean_ptr,  # [C]
    rstd_ptr,  # [C] 1 / sqrt(var + eps), or the variance itself if FROM_VARIANCE
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    save_mean_ptr,  # [C] out, or None
    save_rstd_ptr,  # [C] out, or None
    eps: tl.float64,
    N,
    C,
    P,
    PER_SPLIT,
    CHUNKS,
    ACT: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    FROM_VARIANCE: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Normalize, scale, shift, activate the valid positions; store zero in the padding."""
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane_n, lane_p, s_n, s_p, lane, _, _, _ = tile.frame(
        c, C, P, None, None, None, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(ACC)
    rstd = tl.load(rstd_ptr + c, mask=c < C, other=1.0).to(ACC)
    if FROM_VARIANCE:
        rstd = 1.0 / tl.sqrt(rstd + tl.full([], eps, ACC))
    if save_mean_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(save_mean_ptr + c, mean, mask=c < C)
            tl.store(save_rstd_ptr + c, rstd, mask=c < C)
    scale, shift = epilogue.affine_parameters(c, C, rstd, weight_ptr, bias_ptr)
    first = tl.program_id(1) * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, CHUNKS)
    for i in range(first, last):
        # In reverse: what the moments read last is still in the L2 cache.
        n0, p0 = tile.chunk_origin(first + last - 1 - i, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        kept, some = kept_positions(keep_ptr, lane_n, lane_p, n0, p0, N, P)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        base = n0 * s_n + p0 * s_p
        reads = readable(c, C, kept, some, valid, CHANNELS_LAST)
        x = tl.load(x_ptr + base + lane, mask=reads, other=0.0).to(ACC)
        y = epilogue.pre_activation(x, None, mean, scale, shift)
        y = tl.where(kept[None, :], epilogue.activate(y, ACT, A, B), 0.0)
        tl.store(y_ptr + base + lane, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["PER_SPLIT", "CHUNKS"])
def masked_gradient_kernel(
    dy_ptr,  # [N, C, P] dense
    x_ptr,  # [N, C, P] dense
    keep_ptr,  # uint8 [N, P]
    dx_ptr,  # [N, C, P] out, dense, or None
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    partial_ptr,  # [2, SPLITS, C] sums of g and of g * (x - mean), out, or None
    sums_ptr,  # [2, C] the same over the whole channel, in, or None: given statistics
    count_ptr,  # [1] valid positions, or None
    N,
    C,
    P,
    PER_SPLIT,
    CHUNKS,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    READS_X: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Gradients, sums of gradients, or both, of the valid positions; padding gets zero."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane_n, lane_p, s_n, s_p, lane, _, _, _ = tile.frame(
        c, C, P, None, None, None, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + c, mask=c < C, other=0.0)
    scale, shift = epilogue.affine_parameters(c, C, rstd, weight_ptr, bias_ptr)
    if sums_ptr is not None:
        total = tl.maximum(tl.load(count_ptr), 1.0)
        mean_g = tl.load(sums_ptr + c, mask=c < C, other=0.0) / total
        slope = tl.load(sums_ptr + C + c, mask=c < C, other=0.0) / total * rstd * rstd
    sums_g = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    sums_gx = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    first = tl.program_id(1) * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, CHUNKS)
    for i in range(first, last):
        chunk = i
        if sums_ptr is not None:
            chunk = first + last - 1 - i
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        kept, some = kept_positions(keep_ptr, lane_n, lane_p, n0, p0, N, P)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        base = n0 * s_n + p0 * s_p
        reads = readable(c, C, kept, some, valid, CHANNELS_LAST)
        g = tl.load(dy_ptr + base + lane, mask=reads, other=0.0).to(ACC)
        if READS_X:
            x = tl.load(x_ptr + base + lane, mask=reads, other=0.0).to(ACC)
        if GRADIENT is not None or GATE is not None:
            v = epilogue.pre_activation(x, None, mean, scale, shift)
            g = epilogue.activation_gradient(v, g, True, GRADIENT, GATE, GATED, A, B)
        g = tl.where(kept[None, :], g, 0.0)
        if partial_ptr is not None:
            centred = tl.where(kept[None, :], x - mean[:, None], 0.0)
            sums_g += g
            sums_gx += g * centred
        if dx_ptr is not None:
            if sums_ptr is not None:
                dx = body.input_gradient(g, x, mean, mean_g, slope, scale)
            else:
                dx = g * scale[:, None]
            dx = tl.where(kept[None, :], dx, 0.0)
            tl.store(dx_ptr + base + lane, dx.to(dx_ptr.dtype.element_ty), mask=valid)
    if partial_ptr is not None:
        row = partial_ptr + tl.program_id(1).to(tl.int64) * C + c
        tl.store(row, tl.sum(sums_g, 1), mask=c < C)
        tl.store(row + tl.num_programs(1).to(tl.int64) * C, tl.sum(sums_gx, 1), mask=c < C)
