"""The specification: batch norm forward and backward in plain PyTorch, in float64.

The kernels are held to these functions. They are written to be read, not to be fast. Two more,
`through_activation` and `leaf_gradients`, are shared by the gradients that have derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import ACTIVATIONS, Activation, resolve_learned

# PyTorch's CPU gradient of hardsigmoid has 1/6 in float32 precision, in float64 too.
EXACT: dict[str, Callable[..., Tensor]] = {
    "hardsigmoid": lambda x: torch.where(x.abs() < 3.0, (x + 3.0) / 6.0, F.hardsigmoid(x.detach()))
}


def apply(
    activation: Activation | None, args: Sequence[float], x: Tensor, slope: Tensor | None = None
) -> Tensor:
    """The activation of `x`, exact in float64 forward and backward."""
    if slope is not None:
        return torch.where(x > 0, x, x * channels(slope.reshape(-1), x))
    return x if activation is None else EXACT.get(activation.name, activation.function)(x, *args)


@dataclass(frozen=True)
class Forward:
    """Result of `forward`: the output, and the statistics it was normalized with (biased var)."""

    y: Tensor
    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Backward:
    """Result of `backward`: gradients with respect to input, residual, weight, bias and slope."""

    dx: Tensor
    dresidual: Tensor
    dweight: Tensor
    dbias: Tensor
    dslope: Tensor | None = None


def channels(v: Tensor, like: Tensor) -> Tensor:
    """Reshape a ``[C]`` vector to broadcast over ``like`` of shape ``[N, C, ...]``."""
    return v.reshape(1, -1, *(1,) * (like.dim() - 2))


def _positions(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``x [N, C, ...]``, in two passes."""
    mean = x.mean(_positions(x))
    return mean, (x - channels(mean, x)).square().mean(_positions(x))


def pre_activation(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias + residual``, differentiable in all of
    them."""
    v = (x - channels(mean, x)) * channels(torch.rsqrt(var + eps), x)
    if weight is not None:
        v = v * channels(weight, x)
    if bias is not None:
        v = v + channels(bias, x)
    return v if residual is None else v + residual


def forward(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    slope: Tensor | None = None,
) -> Forward:
    """Batch norm of ``x [N, C, ...]``; statistics of the batch if training, else the running ones.

    Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2. Nothing is changed in place.
    """
    x = x.to(dtype)
    if training:
        mean, var = statistics(x)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: must be given when training=False")
        mean, var = running_mean.to(dtype), running_var.to(dtype)
    w, b, z, s = (None if t is None else t.to(dtype) for t in (weight, bias, residual, slope))
    found, args = resolve_learned(activation, activation_args, slope, x.shape[1])
    return Forward(apply(found, args, pre_activation(x, mean, var, w, b, z, eps), s), mean, var)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    slope: Tensor | None = None,
) -> Backward:
    """Gradients of `forward` for the upstream gradient ``dy``; ``mean`` and ``var`` are those it
    used.

    With g the gradient at the pre-activation, n values per channel and r = 1 / sqrt(var + eps):
    dbias = sum g, dweight = r sum g (x - mean), dslope = sum dy min(v, 0), and in training
    dx = weight r (g - dbias / n - (x - mean) r dweight / n).
    """
    dy, x, mean, var = (t.to(dtype) for t in (dy, x, mean, var))
    w, b, z, s = (None if t is None else t.to(dtype) for t in (weight, bias, residual, slope))
    found, args = resolve_learned(activation, activation_args, slope, x.shape[1])
    with torch.enable_grad():
        v = pre_activation(x, mean, var, w, b, z, eps).detach().requires_grad_()
        (g,) = torch.autograd.grad(apply(found, args, v, s), v, dy) if found else (dy,)
    r = torch.rsqrt(var + eps)
    centred = x - channels(mean, x)
    dbias = g.sum(_positions(x))
    dweight = (g * centred).sum(_positions(x)) * r
    dx = g
    if training:
        n = x.numel() // x.shape[1]
        dx = g - channels(dbias / n, x) - centred * channels(r * dweight / n, x)
    scale = r if weight is None else r * weight.to(dtype)
    dslope = None
    if slope is not None:
        axes = _positions(x) if slope.numel() == x.shape[1] else list(range(x.dim()))
        dslope = (dy * v.detach().clamp(max=0.0)).sum(axes).reshape(slope.shape)
    return Backward(dx * channels(scale, x), g, dweight, dbias, dslope)


def through_activation(
    dy: Tensor, v: Tensor, activation: str, args: Sequence[float], opened: Tensor | None = None
) -> Tensor:
    """The gradient at the pre-activation ``v`` for ``dy`` behind the activation (a name, or empty),
    with derivatives of its own. ``opened``, bool of the shape of ``v``, is where a derivative of
    two values has the first."""
    found = ACTIVATIONS.get(activation)
    if found is None:
        return dy
    if opened is None:
        y = found.function(v, *args)
        return torch.autograd.grad(y, v, dy, create_graph=True)[0]
    assert found.slopes is not None
    through, shut = found.slopes(*args)
    return torch.where(opened, dy * through, dy * shut)


def apart(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Aliases of saved tensors, to differentiate by: a gradient by one of them goes no way around
    through what another of them was computed from, as where a norm is used twice."""
    return tuple(None if t is None else t.view_as(t) for t in tensors)


def leaf_gradients(
    y: Tensor, leaves: Sequence[Any], needs: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of ``y`` by the leaves that need one, with derivatives of their own; None for the
    others."""
    wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True) if wanted else ())
    return tuple(next(found) if needed else None for needed in needs)


def updated_running(
    running: tuple[Tensor, Tensor],
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
    num_batches_tracked: int,
) -> tuple[Tensor, Tensor]:
    """Running mean and (unbiased) variance after a batch of ``count`` values per channel.

    ``momentum`` None is the cumulative average over ``num_batches_tracked`` batches, this one
    included.
    """
    weight = 1.0 / num_batches_tracked if momentum is None else momentum
    unbiased = var * (count / max(count - 1, 1))
    old_mean, old_var = (t.to(mean.dtype) for t in running)
    return old_mean + weight * (mean - old_mean), old_var + weight * (unbiased - old_var)


class Moments(NamedTuple):
    """Of the valid positions: mean and biased variance ``[C]``, and their number, a scalar."""

    mean: Tensor
    var: Tensor
    number: Tensor


def masked_moments(x: Tensor, keep: Tensor) -> Moments:
    """Moments of ``x [N, C, L]`` at the positions in ``keep [N, L]``; zeros if there are none."""
    here = keep[:, None, :]
    count = keep.sum()
    values = count.clamp(min=1).to(x.dtype)
    mean = torch.where(here, x, 0.0).sum((0, 2)) / values
    centred = torch.where(here, x - channels(mean, x), 0.0)
    return Moments(mean, centred.square().sum((0, 2)) / values, count)


def masked_output(
    x: Tensor,
    keep: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None,
    args: Sequence[float],
) -> Tensor:
    """The masked batch norm as differentiable operations of fixed shapes: what lies in the padding
    is dropped first, and zero at the end."""
    here = keep[:, None, :]
    v = pre_activation(torch.where(here, x, 0.0), mean, var, weight, bias, None, eps)
    return torch.where(here, apply(activation, args, v), 0.0)


def masked_forward(x: Tensor, keep: Tensor, *args: Any, **options: Any) -> Forward:
    """The specification: `forward` of the valid positions alone, picked by index, zeros elsewhere.

    ``x [N, C, L]``, ``keep [N, L]`` bool; the other arguments are those of `forward`.
    """
    found = forward(x.movedim(1, 2)[keep], *args, **options)
    y = found.y.new_zeros(x.shape)
    y.movedim(1, 2)[keep] = found.y
    return Forward(y, found.mean, found.var)


def masked_backward(dy: Tensor, x: Tensor, keep: Tensor, *args: Any, **options: Any) -> Backward:
    """`backward` of the valid positions alone; the gradient of padding is zero."""
    found = backward(dy.movedim(1, 2)[keep], x.movedim(1, 2)[keep], *args, **options)
    dx = found.dx.new_zeros(x.shape)
    dx.movedim(1, 2)[keep] = found.dx
    return Backward(dx, torch.zeros_like(dx), found.dweight, found.dbias)
