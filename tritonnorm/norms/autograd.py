"""Gradients of the group norm operators, in the manner of `autograd`.

Kept for backward: the input, the statistics, and with an activation the residual. Nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonnorm.reference import apart, leaf_gradients, through_activation

from . import ops, reference


class GroupNormFunction(torch.autograd.Function):
    """Gradients of `group_norm`; a second derivative goes through plain PyTorch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        options: tuple[int, bool, float, str, tuple[float, ...], int],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        activation = options[3]
        y, mean, rstd = ops.forward(x, residual, weight, bias, *options)
        ctx.save_for_backward(x, residual if activation else None, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(rstd if mean is None else mean, rstd)
        ctx.options = options  # one argument: each costs the host some 0.2 microseconds
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint lets a tensor be unpacked once
        x, residual, weight, bias, mean, rstd = saved
        groups, centred, _, activation, activation_args, size = ctx.options
        needs = [
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1] and bool(activation),
            weight is not None and ctx.needs_input_grad[2],
            bias is not None and ctx.needs_input_grad[3],
        ]
        found: Sequence[Tensor | None]
        if not any(needs):
            found = (None,) * 4
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _differentiable_backward(saved, ctx.options, grads[0], needs)
        else:
            found = ops.backward(
                grads[0], x, residual, weight, bias, mean, rstd,
                groups, centred, activation, activation_args, needs, size,
            )  # fmt: skip
        gradients = [g if needed else None for g, needed in zip(found, needs, strict=True)]
        if ctx.needs_input_grad[1] and not activation:
            gradients[1] = grads[0]
        return (*gradients, None)


_apply = super(torch.autograd.Function, GroupNormFunction).apply


def _differentiable_backward(
    saved: Sequence[Any], options: tuple[Any, ...], dy: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The backward as PyTorch operations, so that it has derivatives itself."""
    x, residual, weight, bias, _, rstd = saved
    x, weight, bias = apart(x, weight, bias)
    groups, centred, eps, activation, activation_args, size = options
    wide = torch.promote_types(x.dtype, rstd.dtype)
    g, x_ = (t.to(wide).reshape(-1, size) if size else t.to(wide) for t in (dy, x))
    z, w, b = (None if t is None else t.to(wide) for t in (residual, weight, bias))
    z = z.reshape(x_.shape) if z is not None else None
    v = reference.pre_activation(x_, groups, w, b, z, eps, centred)
    g = through_activation(g, v, activation, activation_args)
    dx, dweight, dbias = leaf_gradients(v, (x, weight, bias), (needs[0], *needs[2:]), g)
    return dx, g.to(x.dtype).reshape(x.shape) if needs[1] else None, dweight, dbias


def group_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    centred: bool,
    eps: float,
    activation: str,
    activation_args: tuple[float, ...],
    size: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The operator, with autograd if a gradient can be asked for, else without: output, mean (empty
    or None if not centred) and rstd. With a `size`, rows of so many neighbours are normalized."""
    options = (groups, centred, eps, activation, activation_args, size)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        # Without torch.func, which `functional` keeps away, the method in C is all of `apply`.
        apply = GroupNormFunction.apply if torch.compiler.is_compiling() else _apply
        found: tuple[Tensor, Tensor | None, Tensor] = apply(x, residual, weight, bias, options)
        return found
    return ops.forward(x, residual, weight, bias, *options)
