"""The backward kernel of `persistent`; see `_persistent`, whose turns it takes."""

import triton
import triton.language as tl

from . import _barrier as barrier
from . import _body as body
from . import _epilogue as epilogue
from . import _tile as tile


@triton.jit
def _sums_of_block(
    group, dy_ptr, x_ptr, residual_ptr, mask_ptr, dresidual_ptr, partial_ptr, mean_ptr, rstd_ptr,
    weight_ptr, bias_ptr, slope_ptr, dslope_ptr, N, C, P, xs_n, xs_c, xs_p, OWN, CHUNKS,
    ONCE: tl.constexpr, ROUNDS: tl.constexpr, OVERLAP: tl.constexpr, KEPT: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr,
    SPLITS: tl.constexpr, GRADIENT: tl.constexpr, GATE: tl.constexpr, GATED: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, SUMS: tl.constexpr, PLANE: tl.constexpr,
    WIDTH: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """First pass: the sums of a program's chunks go to the workspace; its kept chunks come back."""
    slot = tl.program_id(0)
    slots = tl.num_programs(0)
    split = tl.program_id(1)
    first = split * OWN
    # What is not whole is among the last chunks, which are kept.
    kept_from = tl.maximum(first, tl.minimum(first + OWN, CHUNKS) - KEPT)
    c0, c, end = tile.columns_of(group * slots + slot, C, BLOCK_C, PLANE, WIDTH, VEC)
    own, _to, channels = tile.channels_of(c, end, C, PLANE)
    lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    mean = tl.load(mean_ptr + own, mask=own < channels, other=0.0)
    rstd = tl.load(rstd_ptr + own, mask=own < channels, other=0.0)
    scale, shift = epilogue.affine_parameters(own, channels, rstd, weight_ptr, bias_ptr)
    leak = None
    if slope_ptr is not None:
        leak = epilogue.load_leak(slope_ptr, own, channels, A, ACC)
    sums_g = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    sums_gx = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    sums_leak = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    for chunk in tl.range(first, kept_from, num_stages=STAGES):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        _columns, exist = tile.existing(c, end, lane_n, lane_p, n0, p0, N, P, WHOLE, EVEN)
        x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=exist, other=0.0).to(ACC)
        dy, bits = body.load_gradients(
            dy_ptr, residual_ptr, mask_ptr, n0 * s_n + p0 * s_p, lane, exist,
            c0, n0, p0, N, end, P, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, "", WORDS,
        )  # fmt: skip
        g, of_leak = body.gradient(
            x, dy, bits, mean, scale, shift, leak, exist, residual_ptr, mask_ptr,
            GRADIENT, GATE, GATED, A, B, CHANNELS_LAST,
        )  # fmt: skip
        sums_g += g
        sums_gx += g * (x - mean[:, None])
        if dslope_ptr is not None:
            sums_leak += of_leak
    xs = ()
    dys = ()
    more = ()
    for k in tl.static_range(KEPT):
        n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        raw = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0,
            eviction_policy=ONCE)  # fmt: skip
        dy, other = body.load_gradients(
            dy_ptr, residual_ptr, mask_ptr, n0 * s_n + p0 * s_p, lane, valid,
            c0, n0, p0, N, end, P, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, ONCE, False,
        )  # fmt: skip
        xs = xs + (raw,)
        dys = dys + (dy,)
        more = more + (other,)
    tile.all_on_their_way(N | C | P)
    for k in tl.static_range(KEPT):
        n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        x = xs[k].to(ACC)
        g, of_leak = body.gradient(
            x, dys[k], more[k], mean, scale, shift, leak, valid, residual_ptr, mask_ptr,
            GRADIENT, GATE, GATED, A, B, CHANNELS_LAST,
        )  # fmt: skip
        if dresidual_ptr is not None and not OVERLAP:
            dense = n0 * s_n + p0 * s_p + lane
            dresidual = g.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + dense, dresidual, mask=valid, eviction_policy=ONCE)
        sums_g += g
        sums_gx += g * (x - mean[:, None])
        if dslope_ptr is not None:
            sums_leak += of_leak
    plane = SPLITS * slots * BLOCK_C
    at = partial_ptr + (group % ROUNDS) * SUMS * plane + slot * BLOCK_C + tl.arange(0, BLOCK_C)
    row = at + split * slots * BLOCK_C
    tl.store(row, tile.over_plane(tl.sum(sums_g, 1), PLANE, WIDTH))
    tl.store(row + plane, tile.over_plane(tl.sum(sums_gx, 1), PLANE, WIDTH))
    if dslope_ptr is not None:
        tl.store(row + 2 * plane, tile.over_plane(tl.sum(sums_leak, 1), PLANE, WIDTH))
    return xs, dys, more


@triton.jit
def _gradients_of_block(
    xs, dys, more, group, dy_ptr, x_ptr, residual_ptr, mask_ptr, dx_ptr, dresidual_ptr,
    partial_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, slope_ptr, dweight_ptr, dbias_ptr,
    dslope_ptr, N, C, P, xs_n, xs_c, xs_p, OWN, CHUNKS, ONCE: tl.constexpr, ROUNDS: tl.constexpr,
    OVERLAP: tl.constexpr, KEPT: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, WORDS: tl.constexpr, SPLITS: tl.constexpr, GRADIENT: tl.constexpr,
    GATE: tl.constexpr, GATED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SUMS: tl.constexpr, PLANE: tl.constexpr, WIDTH: tl.constexpr,
    VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Second pass: the sums over the channel block from what all of its programs left in the
    workspace, then the gradients of this one's chunks; in reverse, as the last are the nearest."""
    slot = tl.program_id(0)
    slots = tl.num_programs(0)
    split = tl.program_id(1)
    first = split * OWN
    # What is not whole is among the last chunks, which are kept.
    kept_from = tl.maximum(first, tl.minimum(first + OWN, CHUNKS) - KEPT)
    c0, c, end = tile.columns_of(group * slots + slot, C, BLOCK_C, PLANE, WIDTH, VEC)
    own, once_each, channels = tile.channels_of(c, end, C, PLANE)
    lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    mean = tl.load(mean_ptr + own, mask=own < channels, other=0.0)
    rstd = tl.load(rstd_ptr + own, mask=own < channels, other=0.0)
    scale, shift = epilogue.affine_parameters(own, channels, rstd, weight_ptr, bias_ptr)
    leak = None
    if slope_ptr is not None:
        leak = epilogue.load_leak(slope_ptr, own, channels, A, ACC)
    if OVERLAP:
        xs = ()
        dys = ()
        more = ()
        for k in tl.static_range(KEPT):
            n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
            raw = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0,
                eviction_policy=ONCE)  # fmt: skip
            dy, other = body.load_gradients(
                dy_ptr, residual_ptr, mask_ptr, n0 * s_n + p0 * s_p, lane, valid,
                c0, n0, p0, N, end, P, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, ONCE, False,
            )  # fmt: skip
            xs = xs + (raw,)
            dys = dys + (dy,)
            more = more + (other,)
    plane = SPLITS * slots * BLOCK_C
    at = partial_ptr + (group % ROUNDS) * SUMS * plane + slot * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_g = tl.sum(barrier.rows(at, slots * BLOCK_C, SPLITS, BLOCK_C), 0)
    sum_gx = tl.sum(barrier.rows(at + plane, slots * BLOCK_C, SPLITS, BLOCK_C), 0)
    if split == 0:
        if dbias_ptr is not None:
            dbias = sum_g.to(dbias_ptr.dtype.element_ty)
            tl.store(dbias_ptr + once_each, dbias, mask=once_each < channels)
        if dweight_ptr is not None:
            dweight = (sum_gx * rstd).to(dweight_ptr.dtype.element_ty)
            tl.store(dweight_ptr + once_each, dweight, mask=once_each < channels)
        if dslope_ptr is not None:
            sum_leak = tl.sum(barrier.rows(at + 2 * plane, slots * BLOCK_C, SPLITS, BLOCK_C), 0)
            dslope = sum_leak.to(dslope_ptr.dtype.element_ty)
            tl.store(dslope_ptr + once_each, dslope, mask=once_each < channels)
    total = tl.cast(N, ACC) * tl.cast(P, ACC) * PLANE
    mean_g = sum_g / total
    slope = sum_gx / total * rstd * rstd
    for k in tl.static_range(KEPT):
        n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        x = xs[k].to(ACC)
        g, _of_leak = body.gradient(
            x, dys[k], more[k], mean, scale, shift, leak, None, residual_ptr, mask_ptr,
            GRADIENT, GATE, GATED, A, B, CHANNELS_LAST,
        )  # fmt: skip
        if dresidual_ptr is not None and OVERLAP:
            dense = n0 * s_n + p0 * s_p + lane
            dresidual = g.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + dense, dresidual, mask=valid, eviction_policy=ONCE)
        dx = body.input_gradient(g, x, mean, mean_g, slope, scale)
        base, dx = n0 * s_n + p0 * s_p, dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + base + lane, dx, mask=valid, eviction_policy=ONCE)
    for i in tl.range(first, kept_from, num_stages=STAGES):
        chunk = first + kept_from - 1 - i
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        _columns, exist = tile.existing(c, end, lane_n, lane_p, n0, p0, N, P, WHOLE, EVEN)
        dense = n0 * s_n + p0 * s_p + lane
        x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=exist, other=0.0,
            eviction_policy=ONCE).to(ACC)  # fmt: skip
        dy, bits = body.load_gradients(
            dy_ptr, residual_ptr, mask_ptr, n0 * s_n + p0 * s_p, lane, exist,
            c0, n0, p0, N, end, P, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, ONCE, WORDS,
        )  # fmt: skip
        g, _of_leak = body.gradient(
            x, dy, bits, mean, scale, shift, leak, None, residual_ptr, mask_ptr,
            GRADIENT, GATE, GATED, A, B, CHANNELS_LAST,
        )  # fmt: skip
        if dresidual_ptr is not None:
            dresidual = g.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + dense, dresidual, mask=exist, eviction_policy=ONCE)
        dx = body.input_gradient(g, x, mean, mean_g, slope, scale).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + dense, dx, mask=exist, eviction_policy=ONCE)


@triton.jit(do_not_specialize=["OWN", "CHUNKS", "GROUPS"])
def backward_kernel(
    dy_ptr,  # [N, C, P] dense
    x_ptr,  # [N, C, P]
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    dx_ptr,  # [N, C, P] dense
    dresidual_ptr,  # [N, C, P] dense, or None
    partial_ptr,  # [ROUNDS, SUMS, SPLITS, slots * BLOCK_C] sums of each program, workspace
    semaphore_ptr,  # [slots] int32; [2, slots] with OVERLAP
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
    OWN,
    CHUNKS,
    GROUPS,
    ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
    KEPT: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    WORDS: tl.constexpr,
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
    PLANE: tl.constexpr,  # columns of a channel, where C counts columns (`Problem.flat`)
    WIDTH: tl.constexpr,  # channels of a block
):
    """All gradients; of the kept chunks what is read stays, as in `resident`."""
    SUMS: tl.constexpr = 2 if dslope_ptr is None else 3
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    ROUNDS: tl.constexpr = 4 if OVERLAP else 2
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    slot = tl.program_id(0)
    leader = tl.program_id(1) == 0
    semaphore_ptr += slot
    if OVERLAP:
        # As in the forward kernel.
        before = tl.full([], 0, tl.int32)
        for turn in range(GROUPS + 1):
            arrived = before
            if turn < GROUPS:
                _sums_of_block(
                    turn, dy_ptr, x_ptr, residual_ptr, mask_ptr, dresidual_ptr, partial_ptr,
                    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, slope_ptr, dslope_ptr, N, C, P, xs_n,
                    xs_c, xs_p, OWN, CHUNKS, "", ROUNDS, OVERLAP, KEPT, STAGES, WHOLE, EVEN,
                    WORDS, SPLITS, GRADIENT, GATE, GATED, A, B, BLOCK_C, BLOCK_N, BLOCK_P,
                    CHANNELS_LAST, SUMS, PLANE, WIDTH, VEC, ACC,
                )  # fmt: skip
                arrived = barrier.arrive(
                    semaphore_ptr + turn % 2 * tl.num_programs(0), leader, SPLITS
                )
            if turn > 0:
                barrier.wait(semaphore_ptr + (turn - 1) % 2 * tl.num_programs(0), before)
                _gradients_of_block(
                    (), (), (), turn - 1, dy_ptr, x_ptr, residual_ptr, mask_ptr, dx_ptr,
                    dresidual_ptr, partial_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
                    slope_ptr, dweight_ptr, dbias_ptr, dslope_ptr, N, C, P, xs_n, xs_c, xs_p, OWN,
                    CHUNKS, ONCE, ROUNDS, OVERLAP, KEPT, STAGES, WHOLE, EVEN, WORDS, SPLITS,
                    GRADIENT, GATE, GATED, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, SUMS,
                    PLANE, WIDTH, VEC, ACC,
                )  # fmt: skip
            before = arrived
    else:
        for group in range(GROUPS):
            xs, dys, more = _sums_of_block(
                group, dy_ptr, x_ptr, residual_ptr, mask_ptr, dresidual_ptr, partial_ptr, mean_ptr,
                rstd_ptr, weight_ptr, bias_ptr, slope_ptr, dslope_ptr, N, C, P, xs_n, xs_c, xs_p,
                OWN, CHUNKS, ONCE, ROUNDS, OVERLAP, KEPT, STAGES, WHOLE, EVEN, WORDS, SPLITS,
                GRADIENT, GATE, GATED, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, SUMS, PLANE,
                WIDTH, VEC, ACC,
            )  # fmt: skip
            barrier.meet(semaphore_ptr, leader, SPLITS)
            _gradients_of_block(
                xs, dys, more, group, dy_ptr, x_ptr, residual_ptr, mask_ptr, dx_ptr, dresidual_ptr,
                partial_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, slope_ptr, dweight_ptr,
                dbias_ptr, dslope_ptr, N, C, P, xs_n, xs_c, xs_p, OWN, CHUNKS, ONCE, ROUNDS,
                OVERLAP, KEPT, STAGES, WHOLE, EVEN, WORDS, SPLITS, GRADIENT, GATE, GATED, A, B,
                BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, SUMS, PLANE,
                WIDTH, VEC, ACC,
            )  # fmt: skip
