"""The operators of the masked batch norm: schema, fake, gradient.

`masked_batch_norm_training`, `masked_batch_norm_inference` and `masked_batch_norm_backward` in the
namespace ``tritonnorm``. The input is ``[N, C, L]`` in one of two memory orders, the second being
``[N, L, C]``; anything else is copied into the nearer one. Arguments are checked in `masked`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from tritonnorm import reference
from tritonnorm.activation import ACTIVATIONS
from tritonnorm.device import Device
from tritonnorm.kernels.masked_launches import MaskedBackward, MaskedForward
from tritonnorm.operators import implement
from tritonnorm.ops import vector_of
from tritonnorm.plan import Forced, forced, on_change
from tritonnorm.problem import Problem, View
from tritonnorm.recipe import activity, decided, prepared

_library = torch.library.Library("tritonnorm", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "masked_batch_norm_training(Tensor input, Tensor keep, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float? momentum, float eps, str activation, float[] activation_args) "
    "-> (Tensor output, Tensor mean, Tensor rstd, Tensor count)",
    tags=_tags,
)
_library.define(
    "masked_batch_norm_inference(Tensor input, Tensor keep, Tensor? weight, Tensor? bias, "
    "Tensor running_mean, Tensor running_var, float eps, str activation, "
    "float[] activation_args, bool save_statistics) -> (Tensor output, Tensor mean, Tensor rstd)",
    tags=_tags,
)
_library.define(
    "masked_batch_norm_backward(Tensor grad, Tensor input, Tensor keep, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor rstd, Tensor? count, str activation, "
    "float[] activation_args, bool[] needs) -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    tags=_tags,
)


def _channels_last(x: Tensor) -> bool:
    """Whether the dense twin of ``x [N, C, L]`` is ``[N, L, C]`` in memory."""
    if x.is_contiguous():
        return False
    return x.mT.is_contiguous() or x.stride(1) == 1


def _dense_like(x: Tensor) -> Tensor:
    n, c, length = x.shape
    return x.new_empty((n, length, c)).mT if _channels_last(x) else x.new_empty((n, c, length))


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the memory order of a dense tensor."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


@lru_cache(maxsize=16384)
def recipe(
    direction: Literal["forward", "backward"],
    sizes: tuple[int, ...],
    channels_last: bool,
    dtype: torch.dtype,
    device: Device,
    overrule: Forced | None,
    batch_statistics: bool,
    activation: str,
    activation_args: tuple[float, ...],
    needs: tuple[bool, ...] = (True, True, True),
) -> Callable[[Any], None]:
    """What launches the kernels for tensors of a kind, made once."""
    n, c, length = sizes
    view = View(1, c, n * length, True) if channels_last else View(n, c, length, False)
    problem = Problem(
        *(direction, batch_statistics, view, dtype, activity(activation)),
        needs_dx=needs[0],
        needs_dparams=needs[1] or needs[2],
        form="masked",
    )
    chosen = decided(problem, device, overrule)
    return prepared(problem, device, chosen, activation, activation_args)


on_change(recipe.cache_clear)


def _recipe(
    direction: Literal["forward", "backward"], dense: Tensor, like: Tensor, *kind: Any
) -> Callable[[Any], None]:
    """By sizes and memory order of a dense tensor; ``like`` tells the device."""
    # (N, C, 1) is contiguous in both orders; its rows of channels are the better tiles.
    channels_last = dense.mT.is_contiguous()
    device = Device.of(like.device)
    return recipe(direction, dense.shape, channels_last, like.dtype, device, forced(), *kind)


def _statistics(x: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty(x.shape[1] if wanted else 0, dtype=wide)
    return mean, torch.empty_like(mean)


def _training(
    input: Tensor,
    keep: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    running = (running_mean, running_var, num_batches_tracked)
    torch.autograd.graph.increment_version([t for t in running if t is not None])
    y = _dense_like(input)
    mean, rstd = _statistics(input, True)
    count = mean.new_empty(1)
    run = _recipe("forward", y, input, True, activation, tuple(activation_args))
    affine = (vector_of(weight), vector_of(bias))
    run(
        MaskedForward(
            *(_dense(input, y), y, mean, rstd, None, None, *affine, *running, momentum, eps),
            keep=keep,
            count=count,
        )
    )
    return y, mean, rstd, count


def _inference(
    input: Tensor,
    keep: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
    save_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _dense_like(input)
    mean, rstd = _statistics(input, save_statistics)
    run = _recipe("forward", y, input, False, activation, tuple(activation_args))
    vectors = (vector_of(weight), vector_of(bias), running_mean, running_var)
    given = (_dense(input, y), y, mean, rstd, None, None, *vectors, None, 0.0, eps)
    a = MaskedForward(*given, keep=keep, count=None)
    if not save_statistics:
        a.mean = a.rstd = None
    run(a)
    return y, mean, rstd


def _backward(
    grad: Tensor,
    input: Tensor,
    keep: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``needs``: which of dinput, dweight, dbias to compute; the others come back empty."""
    outputs = _gradients(input, weight, bias, needs)
    like = _dense_like(input)
    dx, dweight, dbias = (t if n else None for t, n in zip(outputs, needs, strict=True))
    kind = (count is not None, activation, tuple(activation_args), tuple(needs))
    run = _recipe("backward", like, input, *kind)
    run(
        MaskedBackward(
            *(_dense(grad, like), _dense(input, like), mean, rstd, None, None),
            *(vector_of(weight), vector_of(bias), dx, None, dweight, dbias),
            keep=keep,
            count=count,
        )
    )
    return outputs


def _gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    def vector(t: Tensor | None, needed: bool) -> Tensor:
        return t.new_empty(t.shape) if needed and t is not None else x.new_empty(0)

    dx = _dense_like(x) if needs[0] else x.new_empty(0)
    return dx, vector(weight, needs[1]), vector(bias, needs[2])


for _name, _implementation in (
    ("masked_batch_norm_training", _training),
    ("masked_batch_norm_inference", _inference),
    ("masked_batch_norm_backward", _backward),
):
    implement(_library, _name, _implementation)


@torch.library.register_fake("tritonnorm::masked_batch_norm_training", lib=_library)
def _(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = _statistics(input, True)
    return _dense_like(input), mean, rstd, mean.new_empty(1)


@torch.library.register_fake("tritonnorm::masked_batch_norm_inference", lib=_library)
def _(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _dense_like(input), *_statistics(input, args[-1])


@torch.library.register_fake("tritonnorm::masked_batch_norm_backward", lib=_library)
def _(grad: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(input, args[1], args[2], args[-1])


class MaskedBatchNormFunction(torch.autograd.Function):
    """Gradients for the two forward operators; a second derivative goes through plain PyTorch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keep: Tensor,
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
    ) -> Tensor:
        y, *saved = _forward(
            x, keep, weight, bias, running_mean, running_var, counter, batch_statistics, momentum,
            eps, activation, activation_args, True,
        )  # fmt: skip
        ctx.save_for_backward(x, keep, weight, bias, *saved)
        ctx.options = (batch_statistics, eps, activation, activation_args)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint lets a tensor be unpacked once
        x, keep, weight, bias, mean, rstd, *count = saved
        batch_statistics, _, activation, activation_args = ctx.options
        wants = ctx.needs_input_grad
        needs = [
            wants[0],
            weight is not None and wants[2],
            bias is not None and wants[3],
        ]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _differentiable_backward(saved, ctx.options, grads[0], needs)
        else:
            found = torch.ops.tritonnorm.masked_batch_norm_backward.default(
                grads[0], x, keep, weight, bias, mean, rstd,
                count[0] if batch_statistics else None, activation, activation_args, needs,
            )  # fmt: skip
        dx, dw, db = (g if needed else None for g, needed in zip(found, needs, strict=True))
        return (dx, None, dw, db, *(None,) * 8)


def _differentiable_backward(
    saved: Sequence[Any], options: tuple[Any, ...], dy: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The backward as PyTorch operations, so that it has derivatives itself."""
    x, keep, weight, bias, mean, rstd, *_ = saved
    x, weight, bias = reference.apart(x, weight, bias)
    batch_statistics, eps, activation, args = options
    wide = torch.promote_types(x.dtype, mean.dtype)
    x_, here = x.to(wide), keep != 0
    var = rstd.square().reciprocal() - eps
    if batch_statistics:
        mean, var, _ = reference.masked_moments(x_, here)
    w, b = (None if t is None else t.to(wide) for t in (weight, bias))
    found = ACTIVATIONS.get(activation)
    y = reference.masked_output(x_, here, mean, var, w, b, eps, found, args)
    return reference.leaf_gradients(y, (x, weight, bias), needs, dy.to(wide))


def _forward(
    x: Tensor,
    keep: Tensor,
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
    save: bool,
) -> tuple[Tensor, ...]:
    ops = torch.ops.tritonnorm
    if batch_statistics:
        return ops.masked_batch_norm_training.default(
            x, keep, weight, bias, running_mean, running_var, counter, momentum, eps,
            activation, activation_args,
        )  # fmt: skip
    return ops.masked_batch_norm_inference.default(
        x, keep, weight, bias, running_mean, running_var, eps, activation, activation_args, save
    )


def masked_batch_norm(
    x: Tensor,
    keep: Tensor,
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
) -> Tensor:
    """The operator that the call needs, with autograd if a gradient can be asked for.

    ``x [N, C, L]``, ``keep`` uint8 ``[N, L]`` contiguous.
    """
    arguments = (
        x, keep, weight, bias, running_mean, running_var, counter, batch_statistics, momentum, eps,
        activation, activation_args,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return MaskedBatchNormFunction.apply(*arguments)
    return _forward(*arguments, False)[0]
