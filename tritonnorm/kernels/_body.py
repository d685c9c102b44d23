"""What is done to one tile, whichever pass over the data it belongs to.

A tile is [BLOCK_C, BLOCK_M] with BLOCK_M = BLOCK_N * BLOCK_P, see `_tile`. `base` is the origin of
its chunk in a dense tensor, `lane` the offsets from there, `valid` which elements exist.
"""

import triton
import triton.language as tl

from . import _epilogue as epilogue
from . import _tile as tile


@triton.jit
def load_residual(
    residual_ptr,  # [N, C, P] dense, or None
    x,  # comes back where there is no residual, for nothing
    base,
    lane,
    valid,
    ONCE: tl.constexpr,  # eviction policy of what is accessed here, or ""
):
    """The residual of a tile as it is. Apart from `store_output`: no load may pass a store, so what
    is to be on its way together is loaded before the first of them."""
    if residual_ptr is None:
        return x
    else:
        return tl.load(residual_ptr + base + lane, mask=valid, other=0.0, eviction_policy=ONCE)


@triton.jit
def store_output(
    x,  # [BLOCK_C, BLOCK_M] accumulator dtype
    residual,  # [BLOCK_C, BLOCK_M] by `load_residual`
    mean,  # [BLOCK_C]
    scale,  # [BLOCK_C] weight * rstd
    shift,  # [BLOCK_C] bias
    leak,  # [BLOCK_C] learned slope of a prelu, in the place of ACT; or None
    y_ptr,  # [N, C, P] output, dense
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    base,
    lane,
    valid,
    c0,
    n0,
    p0,
    N,
    C,
    P,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ONCE: tl.constexpr,
):
    """Normalize, scale, shift, add, activate; write the output and the bits of the gate."""
    added = None
    if residual_ptr is not None:
        added = residual.to(x.dtype)
    v = epilogue.pre_activation(x, added, mean, scale, shift)
    if leak is None:
        y = epilogue.activate(v, ACT, A, B)
    else:
        y = epilogue.prelu(v, leak)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + base + lane, y, mask=valid, eviction_policy=ONCE)
    if mask_ptr is not None:
        bytes_at, bytes_valid = tile.bit_offsets(
            c0, n0, p0, N, C, P, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST
        )
        bits = tile.pack_bits(GATE(v, A, B), BLOCK_C, BLOCK_N * BLOCK_P, CHANNELS_LAST)
        tl.store(mask_ptr + bytes_at, bits, mask=bytes_valid)


@triton.jit
def load_gradients(
    dy_ptr,  # [N, C, P] dense
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    base,
    lane,
    valid,
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
    ONCE: tl.constexpr,
    WORDS: tl.constexpr,  # the bits come in words
):
    """What `gradient` needs besides x, as it is: dy, and the bits of the gate or the residual; dy
    again where it needs neither."""
    dy = tl.load(dy_ptr + base + lane, mask=valid, other=0.0, eviction_policy=ONCE)
    if mask_ptr is None:
        return dy, load_residual(residual_ptr, dy, base, lane, valid, ONCE)
    elif WORDS:
        at, there = tile.word_offsets(c0, n0, p0, N, C, P, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        word = tl.pointer_type(tl.int32)
        return dy, tl.load(mask_ptr.to(word) + at, mask=there, other=0)
    else:
        bytes_at, bytes_valid = tile.bit_offsets(
            c0, n0, p0, N, C, P, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST
        )
        return dy, tl.load(mask_ptr + bytes_at, mask=bytes_valid, other=0)


@triton.jit
def gradient(
    x,  # [BLOCK_C, BLOCK_M] accumulator dtype; None where no activation is recomputed
    dy,  # [BLOCK_C, BLOCK_M] and
    more,  # by `load_gradients`
    mean,  # [BLOCK_C] accumulator dtype
    scale,  # [BLOCK_C] weight * rstd
    shift,  # [BLOCK_C] bias
    leak,  # [BLOCK_C] learned slope, or None
    valid,  # [BLOCK_C, BLOCK_M]; None where all exist, or sums do not follow
    residual_ptr,  # or None: whether `more` is a residual,
    mask_ptr,  # or bits of the gate
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The gradient g at the pre-activation, [BLOCK_C, BLOCK_M]; it is that of the residual too.

    Where no element is, dy reads as 0 and g is 0: sums need not ask what is valid. With g come
    the terms of the gradient of a learned slope; without one g again, for nothing."""
    g = dy.to(mean.dtype)
    of_leak = g
    if mask_ptr is not None:
        if more.dtype == tl.int32:
            gate = tile.unpack_words(more, dy.shape[0], dy.shape[1], CHANNELS_LAST)
        else:
            gate = tile.unpack_bits(more, dy.shape[0], dy.shape[1], CHANNELS_LAST)
        g = GATED(gate, g, A, B)
    elif GRADIENT is not None or GATE is not None or leak is not None:
        added = None
        if residual_ptr is not None:
            added = more.to(mean.dtype)
        v = epilogue.pre_activation(x, added, mean, scale, shift)
        if leak is None:
            g = epilogue.activation_gradient(v, g, valid, GRADIENT, GATE, GATED, A, B)
        else:
            g, of_leak = epilogue.prelu_gradient(v, g, leak)
    return g, of_leak


@triton.jit
def input_gradient(
    g,  # [BLOCK_C, BLOCK_M] gradient at the pre-activation
    x,  # [BLOCK_C, BLOCK_M]
    mean,  # [BLOCK_C]
    mean_g,  # [BLOCK_C] mean of g over the channel
    slope,  # [BLOCK_C] mean of g * (x - mean), times rstd^2
    scale,  # [BLOCK_C] weight * rstd
):
    """The gradient of the input through the statistics of the batch."""
    return (g - mean_g[:, None] - (x - mean[:, None]) * slope[:, None]) * scale[:, None]
