"""The kernels of `group_split`: sums over ranges of a group, and passes that use the whole ones.

The sums of a range are per position for rows, else per channel: K of them make a group. PER is
POSITION or CHANNEL accordingly, and a statistic has the place of its group.
"""

import triton
import triton.language as tl

from . import _groups as groups
from . import _moments as moments


@triton.jit
def range_of(part, PER_SPLIT, CHUNKS):
    """First and last of the chunks that a program walks over."""
    first = part * PER_SPLIT
    return first, tl.minimum(first + PER_SPLIT, CHUNKS)


@triton.jit
def summed_tile(block, chunk, C, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PER: tl.constexpr):
    """First sample, channel and position of a tile of a sum: chunks go along what is summed."""
    if PER == groups.POSITION:
        return block * 0, chunk * BLOCK_C, block * BLOCK_P
    else:
        blocks = tl.cdiv(C, BLOCK_C)
        return block // blocks, block % blocks * BLOCK_C, chunk * BLOCK_P


@triton.jit
def sum_index(n, c, p, C, P, PER: tl.constexpr):
    """Where the sums of a tile lie in [SUMS], and which of them exist."""
    if PER == groups.POSITION:
        return p, p < P
    else:
        return tl.cast(n, tl.int64) * C + c, c < C


@triton.jit(do_not_specialize=["PER_SPLIT", "CHUNKS", "SUMS"])
def moments_kernel(
    x_ptr,  # [N, C, P]
    partial_ptr,  # [3, SPLITS, SUMS] out: count, mean, centred second moment
    G,
    K,
    P,
    xs_n,
    xs_c,
    xs_p,
    PER_SPLIT,  # chunks of a split
    CHUNKS,  # chunks of a sum
    SUMS,  # N * C, or rows
    CENTRED: tl.constexpr,
    PER: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Moments of one range of channels (rows) or positions."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    C, K, P = groups.extents(G, K, P, VEC, CHANNELS_LAST, False)
    some = C + P > 0  # see `moments.settled`
    _s_n, _s_c, _s_p, _lane, x_n, x_c, x_p, x_lane = groups.frame(
        C, P, xs_n, xs_c, xs_p, BLOCK_C, BLOCK_P, CHANNELS_LAST
    )
    first, last = range_of(tl.program_id(1), PER_SPLIT, CHUNKS)
    count = tl.zeros([], ACC)
    total = groups.total(tl.zeros([BLOCK_C, BLOCK_P], ACC), some, PER)
    base = total
    m2 = total
    for run in range(first, last, moments.RUN):
        size = tl.zeros([], ACC)
        pivot = groups.total(tl.zeros([BLOCK_C, BLOCK_P], ACC), some, PER)
        sums = tl.zeros([BLOCK_C, BLOCK_P], ACC)
        squares = tl.zeros([BLOCK_C, BLOCK_P], ACC)
        for chunk in range(run, tl.minimum(run + moments.RUN, last)):
            n, c0, p0 = summed_tile(tl.program_id(0), chunk, C, BLOCK_C, BLOCK_P, PER)
            _c, _p, valid = groups.lanes(c0, C, p0, P, BLOCK_C, BLOCK_P)
            x_at = n * x_n + c0 * x_c + p0 * x_p + x_lane
            x = tl.load(x_ptr + x_at, mask=valid, other=0.0).to(ACC)
            if PER == groups.POSITION:
                values = tl.cast(tl.minimum(C - c0, BLOCK_C), ACC)
            else:
                values = tl.cast(tl.minimum(P - p0, BLOCK_P), ACC)
            if CENTRED:
                if chunk == run:
                    pivot = moments.finite(groups.total(x * (1.0 / values), some, PER))
                sums, squares = moments.add_tile(sums, squares, x, pivot, valid)
            else:
                squares += x * x
            size += values
        count, base, total, m2 = moments.merge_run(
            count, base, total, m2,
            size, pivot,
            groups.total(sums, some, PER), groups.total(squares, some, PER),
        )  # fmt: skip
    mean = base + total / tl.maximum(count, 1.0)
    n, c0, p0 = summed_tile(tl.program_id(0), first, C, BLOCK_C, BLOCK_P, PER)
    c, p, _ = groups.lanes(c0, C, p0, P, BLOCK_C, BLOCK_P)
    at, there = sum_index(n, c, p, C, P, PER)
    plane = tl.num_programs(1).to(tl.int64) * SUMS
    row = partial_ptr + tl.program_id(1).to(tl.int64) * SUMS + at
    tl.store(row, mean * 0.0 + count, mask=there)
    tl.store(row + plane, mean, mask=there)
    tl.store(row + 2 * plane, m2, mask=there)


@triton.jit(do_not_specialize=["PER_SPLIT", "CHUNKS"])
def apply_kernel(
    x_ptr,  # [N, C, P] input
    y_ptr,  # [N, C, P] output, dense
    residual_ptr,  # [N, C, P] dense, or None
    mean_ptr,  # [statistics]; None where not CENTRED
    rstd_ptr,  # [statistics]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    G,
    K,
    P,
    xs_n,
    xs_c,
    xs_p,
    PER_SPLIT,  # chunks of a split
    CHUNKS,  # chunks of a channel block
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    PER: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Normalize, scale, shift, add, activate: one chunk range of one channel block."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    C, K, P = groups.extents(G, K, P, VEC, CHANNELS_LAST, False)
    s_n, s_c, s_p, lane, x_n, x_c, x_p, x_lane = groups.frame(
        C, P, xs_n, xs_c, xs_p, BLOCK_C, BLOCK_P, CHANNELS_LAST
    )
    c0 = tl.program_id(0) * BLOCK_C
    weight, bias = groups.load_affine(
        c0 + tl.arange(0, BLOCK_C)[:, None], C, weight_ptr, bias_ptr, ACC
    )
    first, last = range_of(tl.program_id(1), PER_SPLIT, CHUNKS)
    of_sample = tl.cdiv(P, BLOCK_P)
    for i in range(first, last):
        # In reverse: what the first pass read last is still in the L2 cache.
        chunk = first + last - 1 - i
        n, p0 = chunk // of_sample, chunk % of_sample * BLOCK_P
        c, p, valid = groups.lanes(c0, C, p0, P, BLOCK_C, BLOCK_P)
        x_at = n * x_n + c0 * x_c + p0 * x_p + x_lane
        x = tl.load(x_ptr + x_at, mask=valid, other=0.0).to(ACC)
        at, there = groups.statistic_index(n, c, C, p, G, K, P, PER)
        rstd = tl.load(rstd_ptr + at, mask=there, other=0.0)
        mean = rstd
        if CENTRED:
            mean = tl.load(mean_ptr + at, mask=there, other=0.0)
        groups.store_output(
            x, mean, rstd, weight, bias, y_ptr, residual_ptr,
            n * s_n + c0 * s_c + p0 * s_p + lane, valid, CENTRED, ACT, A, B,
        )  # fmt: skip


@triton.jit(do_not_specialize=["PER_SPLIT", "CHUNKS", "SUMS"])
def sums_kernel(
    dy_ptr,  # [N, C, P] dense
    x_ptr,  # [N, C, P]
    residual_ptr,  # [N, C, P] dense, or None
    mean_ptr,  # [statistics]; None where not CENTRED
    rstd_ptr,  # [statistics]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    partial_ptr,  # [2, SPLITS, SUMS] out: weight * g, and that times normalized x
    G,
    K,
    P,
    xs_n,
    xs_c,
    xs_p,
    PER_SPLIT,
    CHUNKS,
    SUMS,
    CENTRED: tl.constexpr,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    PER: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The sums that dx depends on, over one range of channels (rows) or positions."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    C, K, P = groups.extents(G, K, P, VEC, CHANNELS_LAST, False)
    some = C + P > 0  # see `moments.settled`
    s_n, s_c, s_p, lane, x_n, x_c, x_p, x_lane = groups.frame(
        C, P, xs_n, xs_c, xs_p, BLOCK_C, BLOCK_P, CHANNELS_LAST
    )
    first, last = range_of(tl.program_id(1), PER_SPLIT, CHUNKS)
    sums_g = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    sums_gn = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    n, c0, p0 = summed_tile(tl.program_id(0), first, C, BLOCK_C, BLOCK_P, PER)
    c, p, _ = groups.lanes(c0, C, p0, P, BLOCK_C, BLOCK_P)
    at, there = groups.statistic_index(n, c, C, p, G, K, P, PER)
    rstd = tl.load(rstd_ptr + at, mask=there, other=0.0)
    mean = rstd
    if CENTRED:
        mean = tl.load(mean_ptr + at, mask=there, other=0.0)
    for chunk in range(first, last):
        n, c0, p0 = summed_tile(tl.program_id(0), chunk, C, BLOCK_C, BLOCK_P, PER)
        c, p, valid = groups.lanes(c0, C, p0, P, BLOCK_C, BLOCK_P)
        weight, bias = groups.load_affine(c, C, weight_ptr, bias_ptr, ACC)
        x_at = n * x_n + c0 * x_c + p0 * x_p + x_lane
        x = tl.load(x_ptr + x_at, mask=valid, other=0.0).to(ACC)
        normal = groups.normalized(x, mean, rstd, CENTRED)
        g = groups.load_gradient(
            normal, weight, bias, dy_ptr, residual_ptr, None,
            n * s_n + c0 * s_c + p0 * s_p + lane, valid, GRADIENT, GATE, GATED, A, B,
        )  # fmt: skip
        sums_g += g * weight
        sums_gn += g * weight * normal
    n, c0, p0 = summed_tile(tl.program_id(0), first, C, BLOCK_C, BLOCK_P, PER)
    c, p, _ = groups.lanes(c0, C, p0, P, BLOCK_C, BLOCK_P)
    at, there = sum_index(n, c, p, C, P, PER)
    row = partial_ptr + tl.program_id(1).to(tl.int64) * SUMS + at
    tl.store(row, groups.total(sums_g, some, PER), mask=there)
    plane = tl.num_programs(1).to(tl.int64) * SUMS
    tl.store(row + plane, groups.total(sums_gn, some, PER), mask=there)


@triton.jit(do_not_specialize=["PER_SPLIT", "CHUNKS"])
def gradient_kernel(
    dy_ptr,  # [N, C, P] dense
    x_ptr,  # [N, C, P]
    residual_ptr,  # [N, C, P] dense, or None
    dx_ptr,  # [N, C, P] dense, or None
    dresidual_ptr,  # [N, C, P] dense, or None
    mean_ptr,  # [statistics]; None where not CENTRED
    rstd_ptr,  # [statistics]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    sums_ptr,  # [2, statistics], or None where dx is
    partial_ptr,  # [2, SPLITS, C] sums of g and of g * normalized x, out, or None
    STATISTICS,
    G,
    K,
    P,
    xs_n,
    xs_c,
    xs_p,
    PER_SPLIT,
    CHUNKS,
    CENTRED: tl.constexpr,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    PER: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Gradients, and the sums for dweight and dbias: one chunk range of one channel block."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    C, K, P = groups.extents(G, K, P, VEC, CHANNELS_LAST, False)
    s_n, s_c, s_p, lane, x_n, x_c, x_p, x_lane = groups.frame(
        C, P, xs_n, xs_c, xs_p, BLOCK_C, BLOCK_P, CHANNELS_LAST
    )
    c0 = tl.program_id(0) * BLOCK_C
    column = c0 + tl.arange(0, BLOCK_C)[:, None]
    weight, bias = groups.load_affine(column, C, weight_ptr, bias_ptr, ACC)
    if PER == groups.POSITION:
        count = tl.cast(C, ACC)
    else:
        count = tl.cast(K, ACC) * tl.cast(P, ACC)
    sums_g = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    sums_gn = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    first, last = range_of(tl.program_id(1), PER_SPLIT, CHUNKS)
    of_sample = tl.cdiv(P, BLOCK_P)
    for i in range(first, last):
        chunk = first + last - 1 - i
        n, p0 = chunk // of_sample, chunk % of_sample * BLOCK_P
        c, p, valid = groups.lanes(c0, C, p0, P, BLOCK_C, BLOCK_P)
        x_at = n * x_n + c0 * x_c + p0 * x_p + x_lane
        x = tl.load(x_ptr + x_at, mask=valid, other=0.0).to(ACC)
        at, there = groups.statistic_index(n, c, C, p, G, K, P, PER)
        rstd = tl.load(rstd_ptr + at, mask=there, other=0.0)
        mean = rstd
        if CENTRED:
            mean = tl.load(mean_ptr + at, mask=there, other=0.0)
        normal = groups.normalized(x, mean, rstd, CENTRED)
        dense = n * s_n + c0 * s_c + p0 * s_p + lane
        g = groups.load_gradient(
            normal, weight, bias, dy_ptr, residual_ptr, dresidual_ptr, dense, valid,
            GRADIENT, GATE, GATED, A, B,
        )  # fmt: skip
        if dx_ptr is not None:
            mean_g = tl.load(sums_ptr + at, mask=there, other=0.0) / count
            slope = tl.load(sums_ptr + STATISTICS + at, mask=there, other=0.0) / count
            dx = groups.input_gradient(g, normal, weight, rstd, mean_g, slope, CENTRED)
            tl.store(dx_ptr + dense, dx.to(dx_ptr.dtype.element_ty), mask=valid)
        if partial_ptr is not None:
            sums_g += g
            sums_gn += g * normal
    if partial_ptr is not None:
        row = partial_ptr + tl.program_id(1).to(tl.int64) * C + column
        tl.store(row, tl.sum(sums_g, 1, keep_dims=True), mask=column < C)
        plane = tl.num_programs(1).to(tl.int64) * C
        tl.store(row + plane, tl.sum(sums_gn, 1, keep_dims=True), mask=column < C)
