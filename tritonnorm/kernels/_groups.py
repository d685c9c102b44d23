"""Tiles of group norms: what shares a statistic, and what is done to a tile.

A tile is [BLOCK_C, BLOCK_P], channels by positions of one sample. PER says what shares a statistic:
the channels of a position (layer norm; the rows are the positions of one sample), a GROUP of K
channels over all positions, or one CHANNEL over all positions. Statistics are two-dimensional, and
broadcast over the tile: [1, BLOCK_P], [1, 1] or [BLOCK_C, 1].
"""

import triton
import triton.language as tl

from . import _epilogue as epilogue
from . import _moments as moments
from . import _tile as tile

POSITION = tl.constexpr(0)
GROUP = tl.constexpr(1)
CHANNEL = tl.constexpr(2)


@triton.jit
def extents(G, K, P, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, STRIPS: tl.constexpr):
    """C, K and P, with the hint that VEC divides the contiguous one: K where a program has the
    strip of one group (STRIPS), else C or P."""
    if CHANNELS_LAST:
        if STRIPS:
            K = K // VEC * VEC
            return G * K, K, P
        else:
            return G * K // VEC * VEC, K, P
    else:
        return G * K, K, P // VEC * VEC


@triton.jit
def frame(
    C,
    P,
    xs_n,
    xs_c,
    xs_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Strides ``(s_n, s_c, s_p)`` and offsets in a tile, of dense tensors, then of the input."""
    c = tl.arange(0, BLOCK_C)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    s_n, s_c, s_p = tile.dense_strides(C, P, CHANNELS_LAST)
    lane = c * s_c + p * s_p
    if xs_n is None:
        return s_n, s_c, s_p, lane, s_n, s_c, s_p, lane
    else:
        x_n, x_c, x_p = tl.cast(xs_n, tl.int64), tl.cast(xs_c, tl.int64), tl.cast(xs_p, tl.int64)
        return s_n, s_c, s_p, lane, x_n, x_c, x_p, c * x_c + p * x_p


@triton.jit
def lanes(c0, c_end, p0, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Channels [BLOCK_C, 1], positions [1, BLOCK_P], and which of their elements exist."""
    c = c0 + tl.arange(0, BLOCK_C)[:, None]
    p = p0 + tl.arange(0, BLOCK_P)[None, :]
    return c, p, (c < c_end) & (p < P)


@triton.jit
def total(t, some, PER: tl.constexpr):
    """The sum over what shares a statistic; `some` as in `moments.settled`."""
    t = moments.settled(t, some)
    if PER == POSITION:
        return tl.sum(t, 0, keep_dims=True)
    elif PER == GROUP:
        return tl.sum(tl.sum(t, 1, keep_dims=True), 0, keep_dims=True)
    else:
        return tl.sum(t, 1, keep_dims=True)


@triton.jit
def over_positions(t, some, PER: tl.constexpr):
    """The sum over positions, [BLOCK_C, 1], where they share a statistic; else the tile."""
    if PER == POSITION:
        return t
    else:
        return tl.sum(moments.settled(t, some), 1, keep_dims=True)


@triton.jit
def size_of(C, K, P, ACC: tl.constexpr, PER: tl.constexpr):
    """How many values share a statistic."""
    if PER == POSITION:
        return tl.cast(C, ACC)
    elif PER == GROUP:
        return tl.cast(K, ACC) * tl.cast(P, ACC)
    else:
        return tl.cast(P, ACC)


@triton.jit
def statistic_index(n, c, c_end, p, G, K, P, PER: tl.constexpr):
    """Where the statistics of a tile lie in [statistics], and which of them exist.

    With GROUP all channels of the tile are of one group; with CHANNEL each has the place of its
    own.
    """
    if PER == POSITION:
        return p, p < P
    elif PER == GROUP:
        at = tl.full([1, 1], tl.cast(n, tl.int64) * G, tl.int64) + (c_end - 1) // K
        return at, at >= 0
    else:
        return tl.cast(n, tl.int64) * G + c // K, c < c_end


@triton.jit
def load_affine(c, c_end, weight_ptr, bias_ptr, ACC: tl.constexpr):
    """Weight and bias [BLOCK_C, 1]; None means 1 and 0."""
    weight = tl.full(c.shape, 1.0, ACC)
    bias = tl.full(c.shape, 0.0, ACC)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < c_end, other=0.0).to(ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < c_end, other=0.0).to(ACC)
    return weight, bias


@triton.jit
def normalized(x, mean, rstd, CENTRED: tl.constexpr):
    """(x - mean) * rstd, the subtraction first."""
    if CENTRED:
        x = x - mean
    return x * rstd


@triton.jit
def store_output(
    x,  # [BLOCK_C, BLOCK_P] accumulator dtype
    mean,  # broadcasts
    rstd,  # broadcasts
    weight,  # [BLOCK_C, 1]
    bias,  # [BLOCK_C, 1]
    y_ptr,  # output, dense
    residual_ptr,  # dense, or None
    at,  # [BLOCK_C, BLOCK_P] int64 offsets in dense tensors
    valid,
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """Normalize, scale, shift, add, activate, write."""
    v = normalized(x, mean, rstd, CENTRED) * weight + bias
    if residual_ptr is not None:
        v += tl.load(residual_ptr + at, mask=valid, other=0.0).to(x.dtype)
    y = epilogue.activate(v, ACT, A, B)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def load_gradient(
    normal,  # [BLOCK_C, BLOCK_P] normalized x
    weight,  # [BLOCK_C, 1]
    bias,  # [BLOCK_C, 1]
    dy_ptr,  # dense
    residual_ptr,  # dense, or None
    dresidual_ptr,  # dense, out, or None
    at,
    valid,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """The gradient g at the pre-activation, 0 where no element is; it is that of the residual
    too."""
    g = tl.load(dy_ptr + at, mask=valid, other=0.0).to(normal.dtype)
    if GRADIENT is not None or GATE is not None:
        v = normal * weight + bias
        if residual_ptr is not None:
            v += tl.load(residual_ptr + at, mask=valid, other=0.0).to(normal.dtype)
        g = epilogue.activation_gradient(v, g, valid, GRADIENT, GATE, GATED, A, B)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at, g.to(dresidual_ptr.dtype.element_ty), mask=valid)
    return g


@triton.jit
def input_gradient(g, normal, weight, rstd, mean_g, slope, CENTRED: tl.constexpr):
    """The gradient of the input; mean_g and slope are the means over a group of weight * g and of
    weight * g * normal."""
    inner = g * weight - normal * slope
    if CENTRED:
        inner -= mean_g
    return inner * rstd
