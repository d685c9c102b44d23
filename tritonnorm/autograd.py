"""Gradients of the operators.

The forward saves what `docs/kernels.md` lists and no activation. The backward is one operator; with
``create_graph=True`` it is written in PyTorch operations instead, which have derivatives of any
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .conditions import Kind
from .ops import unpack_mask
from .recipe import activity


class BatchNormFunction(torch.autograd.Function):
    """Gradients for the two forward operators; a second derivative goes through plain PyTorch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        counter: Tensor | None,
        slope: Tensor | None,
        options: tuple[bool, float | None, float, str, tuple[float, ...], Kind | None],
    ) -> Tensor:
        # In one argument: each costs the host some 0.2 microseconds.
        batch_statistics, momentum, eps, activation, activation_args, kind = options
        learned = () if slope is None else (slope,)
        save_mask = residual is not None and activity(activation) == "two_valued"
        direct = ops.unwatched(x, residual, weight, bias, running_mean, running_var, counter, slope)
        if batch_statistics:
            y, mean, rstd, mask = ops.training(direct)(
                x, residual, weight, bias, running_mean, running_var, counter,
                momentum, eps, activation, activation_args, save_mask,
                *((slope, kind) if direct else learned),
            )  # fmt: skip
        else:
            y, mean, rstd, mask = ops.inference(direct)(
                x, residual, weight, bias, running_mean, running_var,
                eps, activation, activation_args, True, save_mask,
                *((slope, kind) if direct else learned),
            )  # fmt: skip
        kept = residual if residual is not None and activity(activation) == "smooth" else None
        saved = (x, kept, mask if save_mask else None, weight, bias, mean, rstd)
        ctx.save_for_backward(*saved, *learned)
        strides = None if torch.compiler.is_compiling() else x.stride()
        ctx.options = (batch_statistics, eps, activation, activation_args, direct, kind, strides)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint lets a tensor be unpacked once
        x, residual, mask, weight, bias, mean, rstd, *learned = saved
        batch_statistics, _, activation, activation_args, direct, kind, strides = ctx.options
        if mask is not None and strides is not None and x.stride() != strides:
            x = ops.in_order(x, strides)
            saved = (x, *saved[1:])
        asked = ctx.needs_input_grad
        needs = (
            asked[0],
            asked[1] and bool(activation),
            weight is not None and asked[2],
            bias is not None and asked[3],
            *((asked[7],) if learned else ()),
        )
        found: Sequence[Tensor | None]
        if not any(needs):
            found = (None,) * 5
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _differentiable_backward(saved, ctx.options, grads[0], needs)
        else:
            direct = direct and ops.unwatched(grads[0], before=saved)
            found = ops.backward(direct)(
                grads[0], x, residual, mask, weight, bias, mean, rstd,
                batch_statistics, activation, activation_args, needs,
                *((*(learned or (None,)), kind) if direct else learned),
            )  # fmt: skip
        gradients = [g if needed else None for g, needed in zip(found, needs, strict=False)]
        if asked[1] and not activation:  # y is the sum of two terms: no kernel
            gradients[1] = grads[0]
        return (*gradients[:4], *(None,) * 3, gradients[4] if learned else None, None)


_apply = super(torch.autograd.Function, BatchNormFunction).apply


def _differentiable_backward(
    saved: Sequence[Any], options: tuple[Any, ...], dy: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The backward as PyTorch operations, so that it has derivatives itself."""
    x, residual, mask, weight, bias, mean, rstd, *learned = saved
    x, weight, bias = reference.apart(x, weight, bias)
    batch_statistics, eps, activation, activation_args, *_ = options
    wide = torch.promote_types(x.dtype, mean.dtype)
    x_, dy_ = x.to(wide), dy.to(wide)
    z, w, b = (None if t is None else t.to(wide) for t in (residual, weight, bias))
    if batch_statistics:
        mean, var = reference.statistics(x_)
    else:
        var = rstd.square().reciprocal() - eps
    v = reference.pre_activation(x_, mean, var, w, b, z, eps)
    if learned:
        leak = learned[0].to(wide).reshape(-1)
        g = torch.where(v > 0, dy_, dy_ * reference.channels(leak, v))
    else:
        opened = None if mask is None else unpack_mask(mask, x)
        g = reference.through_activation(dy_, v, activation, activation_args, opened)
    leaves = (x, weight, bias)
    dx, dweight, dbias = reference.leaf_gradients(v, leaves, (needs[0], *needs[2:4]), g)
    dslope = None
    if learned and needs[4]:
        terms = torch.where(v > 0, 0.0, dy_ * v)
        axes = [d for d in range(v.dim()) if d != 1 or learned[0].numel() == 1]
        dslope = terms.sum(axes).reshape(learned[0].shape).to(learned[0].dtype)
    return dx, g.to(x.dtype) if needs[1] else None, dweight, dbias, dslope


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    batch_statistics: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    activation_args: tuple[float, ...],
    slope: Tensor | None = None,
    kind: Kind | None = None,
) -> Tensor:
    """The operator that the call needs: with autograd if a gradient can be asked for, else without.

    Args:
        kind: everything about the call but its strides, the momentum's value and the gradients that
            are wanted, if there is one.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
        or (slope is not None and slope.requires_grad)
    ):
        # Without torch.func, which `functional` keeps away, the method in C is all of `apply`.
        apply = BatchNormFunction.apply if torch.compiler.is_compiling() else _apply
        return apply(
            x, residual, weight, bias, running_mean, running_var, counter, slope,
            (batch_statistics, momentum, eps, activation, activation_args, kind),
        )  # fmt: skip
    direct = ops.unwatched(x, residual, weight, bias, running_mean, running_var, counter, slope)
    rest: tuple[Any, ...] = (slope, kind) if direct else () if slope is None else (slope,)
    if batch_statistics:
        return ops.training(direct)(
            x, residual, weight, bias, running_mean, running_var, counter,
            momentum, eps, activation, activation_args, False, *rest,
        )[0]  # fmt: skip
    return ops.inference(direct)(
        x, residual, weight, bias, running_mean, running_var,
        eps, activation, activation_args, False, False, *rest,
    )[0]  # fmt: skip
