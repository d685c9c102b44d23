"""Activations as pairs of device functions of the pre-activation v: the value, and the gradient g *
f'(v).

Each is defined as PyTorch defines it, at the boundaries and for NaN and infinity too. A and B are
its parameters, compile-time constants, None where it has fewer. A derivative that takes only two
values is split into a *gate*, the predicate that tells which, and the *gated* gradient: one bit per
element then replaces the pre-activation.
"""

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def _exp(v):
    """exp(v). In float32 by the exponential to base 2, one instruction of the hardware; `tl.exp`
    takes five, four of them for results below 2^-126, which are 0 here."""
    if v.dtype == tl.float64:
        return tl.exp(v)
    else:
        return tl.exp2(v * 1.4426950408889634)


@triton.jit
def _reciprocal(d):
    """1 / d for d >= 1, infinity too. In float32 by the reciprocal root, two instructions and two
    units in the last place; a division takes eight instructions for the same digits."""
    if d.dtype == tl.float64:
        return 1.0 / d
    else:
        root = tl.rsqrt(d)
        return root * root


@triton.jit
def _expm1(v):
    """exp(v) - 1 without cancellation: below 0.5 a Taylor series, 0.5^10 / 11! < 2^-35."""
    TERMS: tl.constexpr = 18 if v.dtype == tl.float64 else 10
    small = tl.where(tl.abs(v) < 0.5, v, 0.0)
    series = tl.full(v.shape, 1.0, v.dtype)
    for i in tl.static_range(TERMS - 1):
        series = 1.0 + series * (small * (1.0 / (TERMS - i)))
    return tl.where(tl.abs(v) < 0.5, small * series, _exp(v) - 1.0)


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], as 2 atanh(s) with s = e / (2 + e) <= 1/3."""
    TERMS: tl.constexpr = 17 if e.dtype == tl.float64 else 9
    s = e / (2.0 + e)
    square = s * s
    series = tl.full(e.shape, 0.0, e.dtype)
    for i in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return 2.0 * s * series


@triton.jit
def sigmoid(v, A: tl.constexpr, B: tl.constexpr):
    return _reciprocal(1.0 + _exp(-v))


@triton.jit
def sigmoid_gradient(v, g, A: tl.constexpr, B: tl.constexpr):
    e = _exp(-tl.abs(v))  # even, and without 1 - s, which cancels where s is near 1
    s = _reciprocal(1.0 + e)
    return g * (e * s * s)


@triton.jit
def tanh(v, A: tl.constexpr, B: tl.constexpr):
    em = _expm1(2.0 * tl.where(tl.abs(v) > 20.0, 20.0, tl.abs(v)))
    t = tl.where(v != v, v, em / (em + 2.0))
    return tl.where(v < 0, -t, t)


@triton.jit
def tanh_gradient(v, g, A: tl.constexpr, B: tl.constexpr):
    t = tanh(v, A, B)
    return g * (1.0 - t) * (1.0 + t)


@triton.jit
def relu(v, A: tl.constexpr, B: tl.constexpr):
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_gate(v, A: tl.constexpr, B: tl.constexpr):
    return (v <= 0) == 0


@triton.jit
def relu_gated(gate, g, A: tl.constexpr, B: tl.constexpr):
    return tl.where(gate, g, 0.0)


@triton.jit
def relu6(v, A: tl.constexpr, B: tl.constexpr):
    return tl.where(v <= 0, 0.0, tl.where(v >= 6.0, 6.0, v))


@triton.jit
def relu6_gate(v, A: tl.constexpr, B: tl.constexpr):
    return ((v <= 0) | (v >= 6.0)) == 0


@triton.jit
def leaky_relu(v, A: tl.constexpr, B: tl.constexpr):
    return tl.where(v > 0, v, v * A)


@triton.jit
def leaky_relu_gate(v, A: tl.constexpr, B: tl.constexpr):
    return v > 0


@triton.jit
def leaky_relu_gated(gate, g, A: tl.constexpr, B: tl.constexpr):
    return tl.where(gate, g, g * A)


@triton.jit
def hardsigmoid(v, A: tl.constexpr, B: tl.constexpr):
    return tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, 1.0, (v + 3.0) * (1.0 / 6.0)))


@triton.jit
def hardsigmoid_gate(v, A: tl.constexpr, B: tl.constexpr):
    return (v > -3.0) & (v < 3.0)


@triton.jit
def hardsigmoid_gated(gate, g, A: tl.constexpr, B: tl.constexpr):
    return tl.where(gate, g * (1.0 / 6.0), 0.0)


@triton.jit
def hardswish(v, A: tl.constexpr, B: tl.constexpr):
    return v * tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, 6.0, v + 3.0)) * (1.0 / 6.0)


@triton.jit
def hardswish_gradient(v, g, A: tl.constexpr, B: tl.constexpr):
    return tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, g, g * (v * (1.0 / 3.0) + 0.5)))


@triton.jit
def silu(v, A: tl.constexpr, B: tl.constexpr):
    return v * sigmoid(v, A, B)


@triton.jit
def silu_gradient(v, g, A: tl.constexpr, B: tl.constexpr):
    e = _exp(-v)
    s = _reciprocal(1.0 + e)
    rest = tl.where(v < 0, 1.0 - s, e * s)  # 1 - s, which cancels where s is near 1
    return g * s * (1.0 + v * rest)


@triton.jit
def _normal(v):
    """The normal distribution's cumulative share and density at v.

    In float32 the share is formula 26.2.17 of Abramowitz and Stegun (1964), to 7.5e-8, which is
    what 1 + erf leaves below 0 in float32, and takes half as many instructions.
    """
    density = _exp(-0.5 * v * v) * 0.3989422804014327
    if v.dtype == tl.float64:
        return 0.5 * (1.0 + tl.erf(v * 0.7071067811865476)), density
    else:
        t = _reciprocal(1.0 + 0.2316419 * tl.abs(v))
        series = -1.821255978 + t * 1.330274429
        series = 0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * series))
        beyond = density * (t * series)
        return tl.where(v < 0, beyond, 1.0 - beyond), density


@triton.jit
def gelu(v, A: tl.constexpr, B: tl.constexpr):
    share, _ = _normal(v)
    return v * share


@triton.jit
def gelu_gradient(v, g, A: tl.constexpr, B: tl.constexpr):
    share, density = _normal(v)
    return g * (share + v * density)


@triton.jit
def gelu_tanh(v, A: tl.constexpr, B: tl.constexpr):
    return 0.5 * v * (1.0 + tanh(0.7978845608028654 * (v + 0.044715 * v * v * v), A, B))


@triton.jit
def gelu_tanh_gradient(v, g, A: tl.constexpr, B: tl.constexpr):
    t = tanh(0.7978845608028654 * (v + 0.044715 * v * v * v), A, B)
    slope = 0.7978845608028654 * (1.0 + 0.134145 * v * v)
    return g * 0.5 * ((1.0 + t) + v * (1.0 - t) * (1.0 + t) * slope)


@triton.jit
def elu(v, A: tl.constexpr, B: tl.constexpr):
    return tl.where(v > 0, v, A * _expm1(tl.where(v > 0, 0.0, v)))


@triton.jit
def elu_gradient(v, g, A: tl.constexpr, B: tl.constexpr):
    return tl.where(v > 0, g, g * A * _exp(tl.where(v > 0, 0.0, v)))


@triton.jit
def softplus(v, A: tl.constexpr, B: tl.constexpr):
    z = v * A
    value = (tl.where(z < 0, 0.0, z) + _log1p(_exp(-tl.abs(z)))) / A
    return tl.where(z > B, v, value)


@triton.jit
def softplus_gradient(v, g, A: tl.constexpr, B: tl.constexpr):
    z = v * A
    return tl.where(z > B, g, g * sigmoid(z, A, B))


@triton.jit
def mish(v, A: tl.constexpr, B: tl.constexpr):
    """With e = exp(v), tanh(log(1 + e)) is n / (n + 2), n = e (e + 2): nothing cancels."""
    e = _exp(tl.where(v > 20.0, 20.0, v))
    n = e * (e + 2.0)
    return v * (n * _reciprocal(n + 2.0))


@triton.jit
def mish_gradient(v, g, A: tl.constexpr, B: tl.constexpr):
    e = _exp(tl.where(v > 20.0, 20.0, v))
    n = e * (e + 2.0)
    share = _reciprocal(n + 2.0)
    curved = n * share + 4.0 * (v * ((e * share) * ((1.0 + e) * share)))
    return g * tl.where(v > 20.0, 1.0 + v * 0.0, curved)  # at infinity NaN, as PyTorch's


class Epilogue(NamedTuple):
    """Device functions of one activation: `gradient` of a smooth one, else `gate` and `gated`."""

    forward: object
    gradient: object = None
    gate: object = None
    gated: object = None


EPILOGUES = {
    "relu": Epilogue(relu, gate=relu_gate, gated=relu_gated),
    "relu6": Epilogue(relu6, gate=relu6_gate, gated=relu_gated),
    "leaky_relu": Epilogue(leaky_relu, gate=leaky_relu_gate, gated=leaky_relu_gated),
    "hardsigmoid": Epilogue(hardsigmoid, gate=hardsigmoid_gate, gated=hardsigmoid_gated),
    "hardswish": Epilogue(hardswish, hardswish_gradient),
    "sigmoid": Epilogue(sigmoid, sigmoid_gradient),
    "tanh": Epilogue(tanh, tanh_gradient),
    "silu": Epilogue(silu, silu_gradient),
    "gelu": Epilogue(gelu, gelu_gradient),
    "gelu_tanh": Epilogue(gelu_tanh, gelu_tanh_gradient),
    "elu": Epilogue(elu, elu_gradient),
    "softplus": Epilogue(softplus, softplus_gradient),
    "mish": Epilogue(mish, mish_gradient),
}


@triton.jit
def affine_parameters(c, C, rstd, weight_ptr, bias_ptr):
    """Scale ``weight * rstd`` and shift ``bias`` of a channel block; None means 1 and 0."""
    scale = rstd
    shift = tl.zeros_like(rstd)
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + c, mask=c < C, other=0.0).to(rstd.dtype)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(rstd.dtype)
    return scale, shift


@triton.jit
def load_leak(slope_ptr, c, C, STEP: tl.constexpr, ACC: tl.constexpr):
    """The learned slopes of a channel block, `STEP` apart in memory: 0 where there is only one."""
    at = c
    if STEP == 0:
        at = c * 0
    return tl.load(slope_ptr + at, mask=c < C, other=0.0).to(ACC)


@triton.jit
def prelu(
    v,  # [BLOCK_C, BLOCK_M] pre-activation
    leak,  # [BLOCK_C] slope below zero
):
    return tl.where(v > 0, v, v * leak[:, None])


@triton.jit
def prelu_gradient(v, g, leak):
    """The gradient at the pre-activation, and the terms whose sum is that of the slope."""
    return tl.where(v > 0, g, g * leak[:, None]), tl.where(v > 0, 0.0, g * v)


@triton.jit
def pre_activation(
    x,  # [BLOCK_C, BLOCK_M] accumulator dtype
    residual,  # [BLOCK_C, BLOCK_M] or None
    mean,  # [BLOCK_C]
    scale,  # [BLOCK_C] weight * rstd
    shift,  # [BLOCK_C] bias
):
    """(x - mean) * scale + shift + residual, subtraction first: a large mean costs no digits."""
    v = (x - mean[:, None]) * scale[:, None] + shift[:, None]
    if residual is not None:
        v += residual
    return v


@triton.jit
def activate(v, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The activation of a tile; ACT None is the identity."""
    if ACT is None:
        return v
    else:
        return ACT(v, A, B)


@triton.jit
def activation_gradient(
    v,
    g,
    valid,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """The gradient g with respect to the activation's output, carried to the pre-activation v.
    Where no element is it stays 0: there v is that of x = 0, and may be so far from the others that
    the activation's slope overflows."""
    if GRADIENT is not None:
        gradient = GRADIENT(v, g, A, B)
        if valid is not None:
            gradient = tl.where(valid, gradient, 0.0)
        return gradient
    else:
        return GATED(GATE(v, A, B), g, A, B)
