"""The specification of group, layer, instance and RMS norm: plain PyTorch, in float64.

The kernels are held to these functions; `reference` is the same for batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonnorm.activation import resolve
from tritonnorm.reference import Backward, apply, channels


def normalized(x: Tensor, groups: int, eps: float, centred: bool = True) -> Tensor:
    """``x [N, C, ...]`` with each group of a sample normalized, differentiable in x.

    Wu and He, "Group Normalization", 2018; Ba, Kiros and Hinton, "Layer Normalization", 2016;
    Ulyanov et al., "Instance Normalization", 2016. Not centred it is that of Zhang and Sennrich,
    "Root Mean Square Layer Normalization", 2019.
    """
    grouped = x.reshape(x.shape[0], groups, -1)
    if centred:
        grouped = grouped - grouped.mean(2, keepdim=True)
    return (grouped * torch.rsqrt(grouped.square().mean(2, keepdim=True) + eps)).reshape(x.shape)


def pre_activation(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    centred: bool = True,
) -> Tensor:
    """``normalized(x) * weight + bias + residual``, differentiable in all of them."""
    v = normalized(x, groups, eps, centred)
    if weight is not None:
        v = v * channels(weight, x)
    if bias is not None:
        v = v + channels(bias, x)
    return v if residual is None else v + residual


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    centred: bool = True,
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    residual: Tensor | None = None,
) -> Tensor:
    """Group norm of ``x [N, C, ...]`` in float64, then the residual and the activation."""
    w, b, z = (None if t is None else t.double() for t in (weight, bias, residual))
    v = pre_activation(x.double(), groups, w, b, z, eps, centred)
    return apply(*resolve(activation, activation_args), v)


def backward(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    centred: bool = True,
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    residual: Tensor | None = None,
) -> Backward:
    """Gradients of `forward` in float64 for the upstream gradient ``dy``.

    With g the gradient at the pre-activation, h = weight g, x̂ the normalized x, and means over a
    group: dbias = sum g, dweight = sum g x̂, dx = r (h - mean h - x̂ mean(h x̂)). Not centred the
    term mean h is absent.
    """
    dy_, x_ = dy.double(), x.double()
    w, b, z = (None if t is None else t.double() for t in (weight, bias, residual))
    found, args = resolve(activation, activation_args)
    with torch.enable_grad():
        v = pre_activation(x_, groups, w, b, z, eps, centred).detach().requires_grad_()
        (g,) = torch.autograd.grad(apply(found, args, v), v, dy_) if found else (dy_,)
    shape = (x_.shape[0], groups, -1)
    normal = normalized(x_, groups, eps, centred)
    h = (g if w is None else g * channels(w, x_)).reshape(shape)
    rows, values = normal.reshape(shape), x_.reshape(shape)
    inner = h - rows * (h * rows).mean(2, keepdim=True)
    if centred:
        inner = inner - h.mean(2, keepdim=True)
        values = values - values.mean(2, keepdim=True)
    dx = (inner * torch.rsqrt(values.square().mean(2, keepdim=True) + eps)).reshape(x_.shape)
    others = [d for d in range(x_.dim()) if d != 1]
    return Backward(dx, g, (g * normal).sum(others), g.sum(others))
