"""Kernels whose programs share a channel block and meet between two passes; see `persistent`.

The programs of a channel block keep what they can of it in registers and leave the rest to the L2
cache; after the first pass they exchange moments (or sums) and meet; the second pass takes the
registers first, then the rest in reverse. Channel blocks that do not fit at once go one group after
the other. Forward moves 2S, backward 3S, as far as a group fits in registers and L2 together.
"""

import triton
import triton.language as tl

from . import _barrier as barrier
from . import _body as body
from . import _epilogue as epilogue
from . import _moments as moments
from . import _tile as tile


@triton.jit(do_not_specialize=["STREAMED", "GROUPS"])
def forward_kernel(
    x_ptr,  # [N, C, P] input
    y_ptr,  # [N, C, P] output, dense
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    partial_ptr,  # [2, 4, SPLITS, slots * BLOCK_C] moments of each program, workspace
    semaphore_ptr,  # [slots] int32
    mean_ptr,  # [C] out
    rstd_ptr,  # [C] out
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    slope_ptr,  # [C] or [1] learned slope of a prelu, or None
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    counter_ptr,  # [] int64 or None
    eps: tl.float64,
    momentum: tl.float64,
    N,
    C,
    P,
    xs_n,
    xs_c,
    xs_p,
    STREAMED,  # chunks of a program that it reads twice
    GROUPS,  # of channel blocks, one after the other
    ONCE: tl.constexpr,  # eviction policy of what is not accessed again
    KEPT: tl.constexpr,  # chunks of a program that stay in its registers
    BATCH: tl.constexpr,  # of the others, chunks whose loads are in flight together
    SPLITS: tl.constexpr,  # programs that share a channel block
    CUMULATIVE: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation; of a learned slope `load_leak`'s STEP
    B: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Statistics, running statistics, normalize, add, activate."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    slot = tl.program_id(0)
    slots = tl.num_programs(0)
    split = tl.program_id(1)
    first = split * (STREAMED + KEPT)
    kept_from = first + STREAMED
    for group in range(GROUPS):
        c0 = (group * slots + slot) * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
            c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
        )
        count, pivot, sums, squares = moments.begin_run(BLOCK_C, BLOCK_N * BLOCK_P, ACC)
        for chunk in range(first, kept_from, BATCH):
            raws = ()
            for k in tl.static_range(BATCH):
                n0, p0 = tile.chunk_before(
                    chunk + k, kept_from, N, P, BLOCK_N, BLOCK_P, CHANNELS_LAST
                )
                valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
                x_at = x_ptr + (n0 * x_n + p0 * x_p) + x_lane
                raws = raws + (tl.load(x_at, mask=valid, other=0.0),)
            for k in tl.static_range(BATCH):
                n0, p0 = tile.chunk_before(
                    chunk + k, kept_from, N, P, BLOCK_N, BLOCK_P, CHANNELS_LAST
                )
                there = tile.valid_columns(lane_n, lane_p, n0, p0, N, P)
                size = tile.chunk_size(n0, p0, N, P, BLOCK_N, BLOCK_P).to(ACC)
                if k == 0:
                    if chunk == first:
                        pivot = moments.pivot(raws[0].to(ACC), there, size)
                sums, squares = moments.add_tile(
                    sums, squares, raws[k].to(ACC), pivot[:, None], there
                )
                count += size
        xs = ()
        for k in tl.static_range(KEPT):
            n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
            x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0,
                eviction_policy=ONCE)  # fmt: skip
            xs = xs + (x,)
        for k in tl.static_range(KEPT):
            n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            there = tile.valid_columns(lane_n, lane_p, n0, p0, N, P)
            size = tile.chunk_size(n0, p0, N, P, BLOCK_N, BLOCK_P).to(ACC)
            if k == 0:
                if STREAMED == 0:
                    pivot = moments.pivot(xs[0].to(ACC), there, size)
            sums, squares = moments.add_tile(sums, squares, xs[k].to(ACC), pivot[:, None], there)
            count += size
        total = tl.sum(sums, 1)
        square = tl.sum(moments.settled(squares, N + C + P > 0), 1)
        m2 = moments.centred(total, square, count)
        # Two rounds of workspace: a program may be one meeting ahead of another.
        plane = SPLITS * slots * BLOCK_C
        at = partial_ptr + (group % 2) * 4 * plane + slot * BLOCK_C + tl.arange(0, BLOCK_C)
        row = at + split * slots * BLOCK_C
        tl.store(row, tl.zeros([BLOCK_C], ACC) + count)
        tl.store(row + plane, pivot)
        tl.store(row + 2 * plane, total)
        tl.store(row + 3 * plane, m2)
        barrier.meet(semaphore_ptr + slot, split == 0, SPLITS)
        counts = barrier.rows(at, slots * BLOCK_C, SPLITS, BLOCK_C)
        firsts = barrier.rows(at + plane, slots * BLOCK_C, SPLITS, BLOCK_C)
        totals = barrier.rows(at + 2 * plane, slots * BLOCK_C, SPLITS, BLOCK_C)
        squares = barrier.rows(at + 3 * plane, slots * BLOCK_C, SPLITS, BLOCK_C)
        base = tl.load(at + plane, cache_modifier=".cg")
        count, total, m2 = moments.rows_moments(counts, firsts, totals, squares, base)
        mean = base + total / count
        rstd = 1.0 / tl.sqrt(m2 / count + tl.full([], eps, ACC))
        if split == 0:
            moments.store_statistics(
                c, mean, m2, rstd, count, C, mean_ptr, rstd_ptr,
                running_mean_ptr, running_var_ptr, counter_ptr if CUMULATIVE else None,
                momentum, CUMULATIVE,
            )  # fmt: skip
        scale, shift = epilogue.affine_parameters(c, C, rstd, weight_ptr, bias_ptr)
        leak = None
        if slope_ptr is not None:
            leak = epilogue.load_leak(slope_ptr, c, C, A, ACC)
        for k in tl.static_range(KEPT):
            n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
            body.store_output(
                xs[k].to(ACC), mean, scale, shift, leak, y_ptr, residual_ptr, mask_ptr,
                n0 * s_n + p0 * s_p, lane, valid, c0, n0, p0, N, C, P,
                ACT, GATE, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, ONCE,
            )  # fmt: skip
        for i in range(0, STREAMED, BATCH):
            raws = ()
            for k in tl.static_range(BATCH):
                n0, p0 = tile.chunk_after(
                    kept_from - 1 - i - k, first, N, P, BLOCK_N, BLOCK_P, CHANNELS_LAST
                )
                valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
                x_at = x_ptr + (n0 * x_n + p0 * x_p) + x_lane
                raws = raws + (tl.load(x_at, mask=valid, other=0.0, eviction_policy=ONCE),)
            for k in tl.static_range(BATCH):
                n0, p0 = tile.chunk_after(
                    kept_from - 1 - i - k, first, N, P, BLOCK_N, BLOCK_P, CHANNELS_LAST
                )
                valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
                body.store_output(
                    raws[k].to(ACC), mean, scale, shift, leak, y_ptr, residual_ptr, mask_ptr,
                    n0 * s_n + p0 * s_p, lane, valid, c0, n0, p0, N, C, P,
                    ACT, GATE, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, ONCE,
                )  # fmt: skip
    if counter_ptr is not None:
        if not CUMULATIVE:
            if (slot == 0) & (split == 0):
                tl.store(counter_ptr, tl.load(counter_ptr) + 1)


@triton.jit(do_not_specialize=["STREAMED", "GROUPS"])
def backward_kernel(
    dy_ptr,  # [N, C, P] dense
    x_ptr,  # [N, C, P]
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    dx_ptr,  # [N, C, P] dense
    dresidual_ptr,  # [N, C, P] dense, or None
    partial_ptr,  # [2, SUMS, SPLITS, slots * BLOCK_C] sums of each program, workspace
    semaphore_ptr,  # [slots] int32
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    slope_ptr,  # [C] or [1] learned slope of a prelu, or None
    dweight_ptr,  # [C] out, or None
    dbias_ptr,  # [C] out, or None
    dslope_ptr,  # [C] out, or None
    N,
    C,
    P,
    xs_n,
    xs_c,
    xs_p,
    STREAMED,
    GROUPS,
    ONCE: tl.constexpr,
    KEPT: tl.constexpr,
    BATCH: tl.constexpr,
    SPLITS: tl.constexpr,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation; of a learned slope `load_leak`'s STEP
    B: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """All gradients; of the kept chunks x stays, and dy (or g, as in `resident`)."""
    KEEP_DY: tl.constexpr = residual_ptr is None and mask_ptr is None and dresidual_ptr is None
    SUMS: tl.constexpr = 2 if dslope_ptr is None else 3
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    slot = tl.program_id(0)
    slots = tl.num_programs(0)
    split = tl.program_id(1)
    first = split * (STREAMED + KEPT)
    kept_from = first + STREAMED
    for group in range(GROUPS):
        c0 = (group * slots + slot) * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
            c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
        )
        mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
        rstd = tl.load(rstd_ptr + c, mask=c < C, other=0.0)
        scale, shift = epilogue.affine_parameters(c, C, rstd, weight_ptr, bias_ptr)
        leak = None
        if slope_ptr is not None:
            leak = epilogue.load_leak(slope_ptr, c, C, A, ACC)
        sums_g = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
        sums_gx = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
        sums_leak = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
        for chunk in range(first, kept_from, BATCH):
            for k in tl.static_range(BATCH):
                n0, p0 = tile.chunk_before(
                    chunk + k, kept_from, N, P, BLOCK_N, BLOCK_P, CHANNELS_LAST
                )
                valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
                x_at = x_ptr + (n0 * x_n + p0 * x_p) + x_lane
                x = tl.load(x_at, mask=valid, other=0.0).to(ACC)
                g, of_leak = body.load_gradient(
                    x, mean, scale, shift, leak, dy_ptr, residual_ptr, mask_ptr, None,
                    n0 * s_n + p0 * s_p, lane, valid, c0, n0, p0, N, C, P,
                    GRADIENT, GATE, GATED, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, "",
                )  # fmt: skip
                sums_g += g
                sums_gx += g * (x - mean[:, None])
                if dslope_ptr is not None:
                    sums_leak += of_leak
        xs = ()
        gs = ()
        for k in tl.static_range(KEPT):
            n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
            raw = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0,
                eviction_policy=ONCE)  # fmt: skip
            x = raw.to(ACC)
            if KEEP_DY:
                dy = tl.load(dy_ptr + (n0 * s_n + p0 * s_p) + lane, mask=valid, other=0.0,
                    eviction_policy=ONCE)  # fmt: skip
                g, of_leak = body.gradient(
                    x, dy.to(ACC), mean, scale, shift, leak, valid, GRADIENT, GATE, GATED, A, B
                )
                gs = gs + (dy,)
            else:
                g, of_leak = body.load_gradient(
                    x, mean, scale, shift, leak, dy_ptr, residual_ptr, mask_ptr, dresidual_ptr,
                    n0 * s_n + p0 * s_p, lane, valid, c0, n0, p0, N, C, P,
                    GRADIENT, GATE, GATED, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, ONCE,
                )  # fmt: skip
                gs = gs + (g,)
            sums_g += g
            sums_gx += g * (x - mean[:, None])
            if dslope_ptr is not None:
                sums_leak += of_leak
            xs = xs + (raw,)
        plane = SPLITS * slots * BLOCK_C
        at = partial_ptr + (group % 2) * SUMS * plane + slot * BLOCK_C + tl.arange(0, BLOCK_C)
        row = at + split * slots * BLOCK_C
        tl.store(row, tl.sum(sums_g, 1))
        tl.store(row + plane, tl.sum(sums_gx, 1))
        if dslope_ptr is not None:
            tl.store(row + 2 * plane, tl.sum(sums_leak, 1))
        barrier.meet(semaphore_ptr + slot, split == 0, SPLITS)
        sum_g = tl.sum(barrier.rows(at, slots * BLOCK_C, SPLITS, BLOCK_C), 0)
        sum_gx = tl.sum(barrier.rows(at + plane, slots * BLOCK_C, SPLITS, BLOCK_C), 0)
        if split == 0:
            if dbias_ptr is not None:
                tl.store(dbias_ptr + c, sum_g.to(dbias_ptr.dtype.element_ty), mask=c < C)
            if dweight_ptr is not None:
                dweight = (sum_gx * rstd).to(dweight_ptr.dtype.element_ty)
                tl.store(dweight_ptr + c, dweight, mask=c < C)
            if dslope_ptr is not None:
                sum_leak = tl.sum(barrier.rows(at + 2 * plane, slots * BLOCK_C, SPLITS, BLOCK_C), 0)
                tl.store(dslope_ptr + c, sum_leak.to(dslope_ptr.dtype.element_ty), mask=c < C)
        total = tl.cast(N, ACC) * tl.cast(P, ACC)
        mean_g = sum_g / total
        slope = sum_gx / total * rstd * rstd
        for k in tl.static_range(KEPT):
            n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
            x = xs[k].to(ACC)
            g = gs[k].to(ACC)
            if KEEP_DY:
                g, of_leak = body.gradient(
                    x, g, mean, scale, shift, leak, True, GRADIENT, GATE, GATED, A, B
                )
            dx = body.input_gradient(g, x, mean, mean_g, slope, scale)
            base, dx = n0 * s_n + p0 * s_p, dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + base + lane, dx, mask=valid, eviction_policy=ONCE)
        for i in range(STREAMED):
            n0, p0 = tile.chunk_origin(kept_from - 1 - i, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
            x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0,
                eviction_policy=ONCE).to(ACC)  # fmt: skip
            g, of_leak = body.load_gradient(
                x, mean, scale, shift, leak, dy_ptr, residual_ptr, mask_ptr, dresidual_ptr,
                n0 * s_n + p0 * s_p, lane, valid, c0, n0, p0, N, C, P,
                GRADIENT, GATE, GATED, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, ONCE,
            )  # fmt: skip
            dx = body.input_gradient(g, x, mean, mean_g, slope, scale)
            base, dx = n0 * s_n + p0 * s_p, dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + base + lane, dx, mask=valid, eviction_policy=ONCE)
