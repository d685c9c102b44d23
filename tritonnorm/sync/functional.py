"""Batch norm over the batches of several processes: the collectives, the gradient, the fallback.

Forward gathers ``[3, C]`` of each rank (count, mean, centred second moment) and merges them by the
formula of Chan, Golub and LeVeque (1979); backward adds ``[2, C]`` over the ranks. That is one
collective in each direction, of a size that does not depend on the batch, and nothing in it waits
for the GPU. A rank with an empty batch takes part with zeros. Where the kernels cannot run, PyTorch
operations compute the same four steps, so ranks may even differ in that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonnorm import activation as activations
from tritonnorm import conditions, reference
from tritonnorm.activation import ACTIVATIONS


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    ranks: int,
    group: str,
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """`functional.batch_norm` in training, with the statistics of the batches of all ranks.

    All ranks of the group must call it, and run its backward, the same number of times.

    Args:
        input: ``[N, C, ...]``; N and the positions may differ between ranks, and N may be 0.
        running_mean: as in `functional.batch_norm`, and so are the others not named here.
        running_var: likewise.
        weight: likewise; its gradient is of this rank alone, for DDP to average.
        bias: likewise.
        momentum: likewise.
        eps: likewise.
        ranks: size of the process group.
        group: its name, `ProcessGroup.group_name`.
        activation: likewise.
        activation_args: likewise.
        residual: likewise.
        num_batches_tracked: likewise.

    Raises:
        ValueError: as in `functional.batch_norm`; a rank may have one value per channel.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, num_batches_tracked)
    act, args = activations.resolve(activation, activation_args)
    reason: str | None = "an argument overrides torch functions"
    if not conditions.has_override(tensors):
        conditions.check_batch_norm(
            *tensors[:5], True, momentum, eps, residual, num_batches_tracked, alone=False,
        )  # fmt: skip
        reason = conditions.surroundings(input) or conditions.unsupported_batch_norm(*tensors[:5])
    if reason is None:
        return SyncFunction.apply(
            *(input, residual, weight, bias, running_mean, running_var, num_batches_tracked),
            *(momentum, eps, act.name if act else "", args, True, ranks, group),
        )
    conditions.log_once("SyncBatchNorm", reason)
    y = _by_torch(
        *(input, None, weight, bias, running_mean, running_var, num_batches_tracked),
        *(momentum, eps, "", (), False, ranks, group),
    )
    return activations.apply(act, args, y if residual is None else y + residual)


class SyncFunction(torch.autograd.Function):
    """The four steps with a collective between each two, by kernels or by PyTorch."""

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
        momentum: float | None,
        eps: float,
        activation: str,
        activation_args: tuple[float, ...],
        kernels: bool,
        ranks: int,
        group: str,
    ) -> Tensor:
        buffers = (running_mean, running_var, counter)
        kept, mask = None, None
        if kernels:
            from . import ops

            two_valued = bool(activation) and ACTIVATIONS[activation].two_valued
            save_mask = residual is not None and two_valued
            gathered = _gather(ops.call("moments", x), ranks, group)
            y, mean, rstd, merged, bits = ops.call(
                *("apply_moments", x, residual, weight, bias, gathered, *buffers),
                *(momentum, eps, activation, activation_args, save_mask),
            )
            mask = bits if save_mask else None
            kept = residual if activation and not two_valued else None
        else:
            gathered = _gather(_moments(x), ranks, group)
            y, mean, rstd, merged = _apply(x, weight, bias, gathered, *buffers, momentum, eps)
        ctx.save_for_backward(x, kept, mask, weight, bias, mean, rstd, merged)
        ctx.options = (eps, activation, activation_args, kernels, ranks, group)
        ctx.strides = None if torch.compiler.is_compiling() else x.stride()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint lets a tensor be unpacked once
        x, _, mask, weight, bias, mean, rstd, merged = saved
        if mask is not None and ctx.strides is not None and x.stride() != ctx.strides:
            from tritonnorm import ops as plain

            x = plain.in_order(x, ctx.strides)
            saved = (x, *saved[1:])
        _, *epilogue, kernels, _, group = ctx.options
        added = ctx.needs_input_grad[1] and not epilogue[0]  # its gradient is that of y
        needs = [
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1] and not added,
            weight is not None and ctx.needs_input_grad[2],
            bias is not None and ctx.needs_input_grad[3],
        ]
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _differentiable_backward(saved, ctx.options, grads[0], needs)
        elif kernels:
            from . import ops

            sums = dx = dresidual = dweight = dbias = None
            if needs[0] or needs[2] or needs[3]:
                own, dweight, dbias = ops.call(
                    "gradient_sums", grads[0], *saved[:-1], *epilogue, needs[2:]
                )
                sums = _add(own, group) if needs[0] else None
            if needs[0] or needs[1]:
                dx, dresidual = ops.call(
                    *("apply_gradient_sums", grads[0], *saved[:-1]),
                    *(sums, merged[0], *epilogue, needs[:2]),
                )
            found = (dx, dresidual, dweight, dbias)
        else:
            sums = _sums(grads[0], x, mean)
            dx = None
            if needs[0]:
                dx = _gradient(grads[0], x, weight, mean, rstd, _add(sums, group), merged[0])
            dweight = None if weight is None else (sums[1] * rstd).to(weight.dtype)
            found = (dx, None, dweight, None if bias is None else sums[0].to(bias.dtype))
        gradients = [g if needed else None for g, needed in zip(found, needs, strict=True)]
        if added:
            gradients[1] = grads[0]
        return (*gradients, *(None,) * 10)


def _by_torch(*args: Any) -> Tensor:
    return SyncFunction.apply(*args)


# In a graph of torch 2.11 the gradients of the fallback are wrong by as much as themselves, with
# the backend "eager" too; those of 2.13 are right. Before that it runs outside the graph. What
# `torch.compiler.disable` loads at once, triton among it, this loads at the first call.
if torch.__version__ < "2.13":
    _by_torch = torch._disable_dynamo(_by_torch)


def _gather(moments: Tensor, ranks: int, group: str) -> Tensor:
    """``[R, 3, C]`` of all ranks. The functional collectives are those that compilers know."""
    c10d = torch.ops._c10d_functional
    gathered = c10d.all_gather_into_tensor(moments, ranks, group)
    return c10d.wait_tensor(gathered).view(ranks, *moments.shape)


def _add(sums: Tensor, group: str) -> Tensor:
    """The sum over all ranks."""
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_reduce(sums, "sum", group))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positions(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _moments(x: Tensor) -> Tensor:
    """``[3, C]``: count, mean, centred second moment; zeros of an empty batch."""
    x = _wide(x)
    count = x.numel() // x.shape[1]
    mean = x.sum(_positions(x)) / max(count, 1)
    m2 = (x - reference.channels(mean, x)).square().sum(_positions(x))
    return torch.stack([torch.full_like(mean, count), mean, m2])


def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gathered: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, mean, rstd and merged moments ``[3, C]``; moves the running statistics, unless no
    rank has a value."""
    counts, means, m2s = gathered.unbind(1)
    count = counts.sum(0)
    whole = count.clamp(min=1)
    mean = (counts * means).sum(0) / whole
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    var = m2 / whole
    if counter is not None:
        counter.add_(1)
    if running_mean is not None and running_var is not None:
        if momentum is not None:
            share = torch.full_like(mean, momentum)
        else:
            assert counter is not None  # `functional` has checked
            share = torch.ones_like(mean) / counter
        share = torch.where(count > 0, share, 0.0)
        unbiased = m2 / (count - 1).clamp(min=1)
        running_mean.copy_(running_mean * (1 - share) + mean * share)
        running_var.copy_(running_var * (1 - share) + unbiased * share)
    w, b = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
    y = reference.pre_activation(_wide(x), mean, var, w, b, None, eps)
    return y.to(x.dtype), mean, torch.rsqrt(var + eps), torch.stack([count, mean, m2])


def _sums(dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """``[2, C]``: sums of dy and of dy (x - mean)."""
    dy, x = _wide(dy), _wide(x)
    centred = x - reference.channels(mean, x)
    return torch.stack([dy.sum(_positions(x)), (dy * centred).sum(_positions(x))])


def _gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """dx, from the sums of all ranks."""
    dtype, dy, x = x.dtype, _wide(dy), _wide(x)
    mean_g, mean_gx = sums / count.clamp(min=1)
    centred = x - reference.channels(mean, x)
    dx = dy - reference.channels(mean_g, x) - centred * reference.channels(mean_gx * rstd**2, x)
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    return (dx * reference.channels(scale, x)).to(dtype)


class _Added(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _add(sums.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Added.apply(grads[0], ctx.group), None


def _differentiable_backward(
    saved: Sequence[Any], options: tuple[Any, ...], dy: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The backward as PyTorch operations and collectives that have derivatives themselves."""
    x, residual, mask, weight, bias, mean, _, merged = saved
    x, weight, bias = reference.apart(x, weight, bias)
    eps, activation, activation_args, _, _, group = options
    count = merged[0].clamp(min=1)
    x_, dy_ = (t.to(mean.dtype) for t in (x, dy))
    w, b, z = (None if t is None else t.to(mean.dtype) for t in (weight, bias, residual))
    mean = _Added.apply(x_.sum(_positions(x)), group) / count
    centred = (x_ - reference.channels(mean, x)).square().sum(_positions(x))
    var = _Added.apply(centred, group) / count
    v = reference.pre_activation(x_, mean, var, w, b, z, eps)
    opened = None
    if mask is not None:
        from tritonnorm.ops import unpack_mask

        opened = unpack_mask(mask, x, "synced")
    g = reference.through_activation(dy_, v, activation, activation_args, opened)
    leaves = (x, weight, bias)
    dx, dweight, dbias = reference.leaf_gradients(v, leaves, (needs[0], *needs[2:]), g)
    return dx, g.to(x.dtype) if needs[1] else None, dweight, dbias
