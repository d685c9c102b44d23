"""Kernels that keep a whole channel block in the registers of one program; see `resident`.

With PLANE > 1 the columns are those of `Problem.flat`: a channel has PLANE of them. What is summed
over a column is then summed over the columns of its channel.
"""

import triton
import triton.language as tl

from . import _body as body
from . import _epilogue as epilogue
from . import _moments as moments
from . import _tile as tile


@triton.jit
def forward_kernel(
    x_ptr,  # [N, C, P] input
    y_ptr,  # [N, C, P] output, dense
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
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
    CUMULATIVE: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation; of a learned slope `load_leak`'s STEP
    B: tl.constexpr,
    CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,  # chunks of the residual that are on their way together
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PLANE: tl.constexpr,  # columns of a channel, where C counts columns (`Problem.flat`)
    WIDTH: tl.constexpr,  # channels of a block
):
    """Statistics, running statistics, normalize, add, activate, for one channel block."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c0, c, end = tile.columns_of(tl.program_id(0), C, BLOCK_C, PLANE, WIDTH, VEC)
    at, to, channels = tile.channels_of(c, end, C, PLANE)
    lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    xs = ()
    for chunk in tl.static_range(CHUNKS):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        xs = xs + (tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0),)
    residuals = ()
    for chunk in tl.static_range(AHEAD):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        dense = n0 * s_n + p0 * s_p
        residuals = residuals + (
            body.load_residual(residual_ptr, xs[chunk], dense, lane, valid, ""),
        )
    if VEC > 1:  # many loads of single elements are on their way in any order
        tile.all_on_their_way(N | C | P)
    one = tl.full([BLOCK_C], 1.0, ACC)
    scale, shift = epilogue.affine_parameters(at, channels, one, weight_ptr, bias_ptr)
    leak = None
    if slope_ptr is not None:
        leak = epilogue.load_leak(slope_ptr, at, channels, A, ACC)
    count = tl.cast(N, ACC) * tl.cast(P, ACC) * PLANE
    _, pivot, sums, squares = moments.begin_run(BLOCK_C, BLOCK_N * BLOCK_P, ACC)
    for chunk in tl.static_range(CHUNKS):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        there = tile.valid_columns(lane_n, lane_p, n0, p0, N, P)
        if chunk == 0:
            size = tile.chunk_size(n0, p0, N, P, BLOCK_N, BLOCK_P).to(ACC) * PLANE
            pivot = tl.where(c < end, moments.mean_of(xs[0].to(ACC), there, size), 0.0)
            pivot = moments.finite(tile.over_plane(pivot, PLANE, WIDTH))
        sums, squares = moments.add_tile(sums, squares, xs[chunk].to(ACC), pivot[:, None], there)
    total = tile.over_plane(tl.sum(sums, 1), PLANE, WIDTH)
    if CHUNKS == 1:  # else they are sums of products already
        squares = moments.settled(squares, moments.exist(N, C, P))
    m2 = moments.centred(total, tile.over_plane(tl.sum(squares, 1), PLANE, WIDTH), count)
    mean = pivot + total / count
    rstd = 1.0 / tl.sqrt(m2 / count + tl.full([], eps, ACC))
    scale *= rstd
    for chunk in tl.static_range(CHUNKS):
        if chunk + AHEAD < CHUNKS:
            n0, p0 = tile.chunk_origin(chunk + AHEAD, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
            dense = n0 * s_n + p0 * s_p
            residual = body.load_residual(residual_ptr, xs[chunk + AHEAD], dense, lane, valid, "")
            residuals = residuals + (residual,)
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        base = n0 * s_n + p0 * s_p
        body.store_output(
            xs[chunk].to(ACC), residuals[chunk], mean, scale, shift, leak,
            y_ptr, residual_ptr, mask_ptr,
            base, lane, valid, c0, n0, p0, N, end, P,
            ACT, GATE, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, "",
        )  # fmt: skip
    moments.store_statistics(
        to, mean, m2, rstd, count, channels, mean_ptr, rstd_ptr,
        running_mean_ptr, running_var_ptr, counter_ptr, momentum, CUMULATIVE,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    dy_ptr,  # [N, C, P] dense
    x_ptr,  # [N, C, P]
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    dx_ptr,  # [N, C, P] dense, or None
    dresidual_ptr,  # [N, C, P] dense, or None
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
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation; of a learned slope `load_leak`'s STEP
    B: tl.constexpr,
    CHUNKS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PLANE: tl.constexpr,  # columns of a channel, where C counts columns (`Problem.flat`)
    WIDTH: tl.constexpr,  # channels of a block
):
    """All gradients of one channel block. What is read stays in registers as it is, and the
    gradient at the pre-activation is computed twice from it."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c0, c, end = tile.columns_of(tl.program_id(0), C, BLOCK_C, PLANE, WIDTH, VEC)
    at, to, channels = tile.channels_of(c, end, C, PLANE)
    lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    xs = ()
    dys = ()
    more = ()
    for chunk in tl.static_range(CHUNKS):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        xs = xs + (tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0),)
        dy, other = body.load_gradients(
            dy_ptr, residual_ptr, mask_ptr, n0 * s_n + p0 * s_p, lane, valid, c0, n0, p0, N, end, P,
            BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, "", False,
        )  # fmt: skip
        dys = dys + (dy,)
        more = more + (other,)
    tile.all_on_their_way(N | C | P)
    mean = tl.load(mean_ptr + at, mask=at < channels, other=0.0)
    rstd = tl.load(rstd_ptr + at, mask=at < channels, other=0.0)
    scale, shift = epilogue.affine_parameters(at, channels, rstd, weight_ptr, bias_ptr)
    leak = None
    if slope_ptr is not None:
        leak = epilogue.load_leak(slope_ptr, at, channels, A, ACC)
    sums_g = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    sums_gx = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    sums_leak = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    for chunk in tl.static_range(CHUNKS):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        x = xs[chunk].to(ACC)
        g, of_leak = body.gradient(
            x, dys[chunk], more[chunk], mean, scale, shift, leak, valid, residual_ptr, mask_ptr,
            GRADIENT, GATE, GATED, A, B, CHANNELS_LAST,
        )  # fmt: skip
        if dresidual_ptr is not None:
            dense = n0 * s_n + p0 * s_p + lane
            tl.store(dresidual_ptr + dense, g.to(dresidual_ptr.dtype.element_ty), mask=valid)
        sums_g += g
        sums_gx += g * (x - mean[:, None])
        if dslope_ptr is not None:
            sums_leak += of_leak
    sum_g = tile.over_plane(tl.sum(sums_g, 1), PLANE, WIDTH)
    sum_gx = tile.over_plane(tl.sum(sums_gx, 1), PLANE, WIDTH)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + to, sum_g.to(dbias_ptr.dtype.element_ty), mask=to < channels)
    if dweight_ptr is not None:
        dweight = (sum_gx * rstd).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + to, dweight, mask=to < channels)
    if dslope_ptr is not None:
        sum_leak = tile.over_plane(tl.sum(sums_leak, 1), PLANE, WIDTH)
        tl.store(dslope_ptr + to, sum_leak.to(dslope_ptr.dtype.element_ty), mask=to < channels)
    if dx_ptr is not None:
        count = tl.cast(N, ACC) * tl.cast(P, ACC) * PLANE
        mean_g = sum_g / count
        slope = sum_gx / count * rstd * rstd
        for chunk in tl.static_range(CHUNKS):
            n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
            base = n0 * s_n + p0 * s_p
            x = xs[chunk].to(ACC)
            g, of_leak = body.gradient(
                x, dys[chunk], more[chunk], mean, scale, shift, leak, None, residual_ptr, mask_ptr,
                GRADIENT, GATE, GATED, A, B, CHANNELS_LAST,
            )  # fmt: skip
            dx = body.input_gradient(g, x, mean, mean_g, slope, scale)
            tl.store(dx_ptr + base + lane, dx.to(dx_ptr.dtype.element_ty), mask=valid)
