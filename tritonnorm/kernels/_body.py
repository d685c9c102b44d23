"""What is done to one tile, whichever pass over the data it belongs to.

A tile is [BLOCK_C, BLOCK_M] with BLOCK_M = BLOCK_N * BLOCK_P, see `_tile`. `base` is the origin of
its chunk in a dense tensor, `lane` the offsets from there, `valid` which elements exist.
"""

import triton
import triton.language as tl

from . import _epilogue as epilogue
from . import _tile as tile


@triton.jit
def store_output(
    x,  # [BLOCK_C, BLOCK_M] accumulator dtype
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
    ONCE: tl.constexpr,  # eviction policy of what is accessed here, or ""
):
    """Normalize, scale, shift, add, activate; write the output and the bits of the gate."""
    residual = None
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + base + lane, mask=valid, other=0.0, eviction_policy=ONCE)
        residual = residual.to(x.dtype)
    v = epilogue.pre_activation(x, residual, mean, scale, shift)
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
def load_gradient(
    x,  # [BLOCK_C, BLOCK_M] accumulator dtype; None where no activation is recomputed
    mean,  # [BLOCK_C] accumulator dtype
    scale,  # [BLOCK_C] weight * rstd
    shift,  # [BLOCK_C] bias
    leak,  # [BLOCK_C] learned slope, or None
    dy_ptr,  # [N, C, P] dense
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    dresidual_ptr,  # [N, C, P] dense, out, or None
    base,
    lane,
    valid,
    c0,
    n0,
    p0,
    N,
    C,
    P,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ONCE: tl.constexpr,
):
    """The gradient g at the pre-activation, [BLOCK_C, BLOCK_M]; it is that of the residual too.

    Where no element is, dy reads as 0 and g is 0: sums need not ask what is valid. With g come
    the terms of the gradient of a learned slope; without one g again, for nothing."""
    g = tl.load(dy_ptr + base + lane, mask=valid, other=0.0, eviction_policy=ONCE).to(mean.dtype)
    of_leak = g
    if mask_ptr is not None:
        bytes_at, bytes_valid = tile.bit_offsets(
            c0, n0, p0, N, C, P, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST
        )
        bits = tl.load(mask_ptr + bytes_at, mask=bytes_valid, other=0)
        gate = tile.unpack_bits(bits, BLOCK_C, BLOCK_N * BLOCK_P, CHANNELS_LAST)
        g = GATED(gate, g, A, B)
    elif GRADIENT is not None or GATE is not None or leak is not None:
        residual = None
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + base + lane, mask=valid, other=0.0,
                eviction_policy=ONCE).to(mean.dtype)  # fmt: skip
        v = epilogue.pre_activation(x, residual, mean, scale, shift)
        if leak is None:
            g = epilogue.activation_gradient(v, g, valid, GRADIENT, GATE, GATED, A, B)
        else:
            g, of_leak = epilogue.prelu_gradient(v, g, leak)
    if dresidual_ptr is not None:
        dresidual = g.to(dresidual_ptr.dtype.element_ty)
        tl.store(dresidual_ptr + base + lane, dresidual, mask=valid, eviction_policy=ONCE)
    return g, of_leak


@triton.jit
def gradient(
    x,  # [BLOCK_C, BLOCK_M] accumulator dtype
    dy,  # [BLOCK_C, BLOCK_M] accumulator dtype
    mean,  # [BLOCK_C]
    scale,  # [BLOCK_C] weight * rstd
    shift,  # [BLOCK_C] bias
    leak,  # [BLOCK_C] learned slope, or None
    valid,  # [BLOCK_C, BLOCK_M], or True where sums do not follow
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """The same two without residual and mask: from what is at hand."""
    of_leak = dy
    if leak is not None:
        v = epilogue.pre_activation(x, None, mean, scale, shift)
        dy, of_leak = epilogue.prelu_gradient(v, dy, leak)
    elif GRADIENT is not None or GATE is not None:
        v = epilogue.pre_activation(x, None, mean, scale, shift)
        dy = epilogue.activation_gradient(v, dy, valid, GRADIENT, GATE, GATED, A, B)
    return dy, of_leak


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
