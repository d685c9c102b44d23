"""The operators of group, layer, instance and RMS norm: schema, fake, and the execution of a plan.

All four are `group_norm` and `group_norm_backward` in the namespace ``tritonnorm``, as
`problem` describes them. Arguments are checked above, in `functional`; gradients are attached by
`autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonnorm.device import Device
from tritonnorm.kernels.group_base import GroupBackward, GroupForward
from tritonnorm.operators import implement
from tritonnorm.ops import Maybe, dense_like, operator, promised, unwatched, vector_of
from tritonnorm.plan import Forced, Plan, forced, on_change
from tritonnorm.recipe import activity, decided, prepared

from .problem import GroupProblem, described

_library = torch.library.Library("tritonnorm", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "group_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int groups, "
    "bool centred, float eps, str activation, float[] activation_args, int size) "
    "-> (Tensor output, Tensor mean, Tensor rstd)",
    tags=_tags,
)
_library.define(
    "group_norm_backward(Tensor grad, Tensor input, Tensor? residual, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor rstd, int groups, bool centred, "
    "str activation, float[] activation_args, bool[] needs, int size) "
    "-> (Tensor dinput, Tensor dresidual, Tensor dweight, Tensor dbias)",
    tags=_tags,
)
_library.define(
    "instance_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, "
    "Tensor rstd, int count, float momentum, float eps) -> ()",
    tags=_tags,
)


class GroupRecipe(NamedTuple):
    """Everything about a call that does not depend on the contents of its tensors.

    Attributes:
        run: launches the kernels of the plan.
        plan: the algorithm and its configuration.
        problem: what they compute.
        dense: strides of a dense twin of the input, in one of the two orders.
        copies: whether the input has no view, and a dense copy of it is computed on.
        reorders: whether a tensor like the input is in neither order, so that results are copied.
    """

    run: Callable[[Any], None]
    plan: Plan
    problem: GroupProblem
    dense: tuple[int, ...]
    copies: bool
    reorders: bool


@lru_cache(maxsize=16384)
def recipe(
    direction: Literal["forward", "backward"],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: Device,
    overrule: Forced | None,
    groups: int,
    centred: bool,
    activation: str,
    activation_args: tuple[float, ...],
    residual: bool,
    needs: tuple[bool, ...] = (True, False, True, True),
) -> GroupRecipe:
    """Made once for all calls that are alike."""
    problem, dense, copies, reorders = described(
        *(direction, sizes, strides, dtype, groups, centred, activity(activation), residual, needs)
    )
    chosen = decided(problem, device, overrule)
    run = prepared(problem, device, chosen, activation, activation_args)
    return GroupRecipe(run, chosen, problem, dense, copies, reorders)


on_change(recipe.cache_clear)


def _rows(t: Tensor, size: int) -> Tensor:
    """Something that a kernel can read as rows of `size` neighbours, where that is not 0."""
    if not size or t.is_contiguous():
        return t
    found = t.reshape(-1, size)
    return found if found.stride(1) == 1 or size == 1 else found.contiguous()


def _seen(t: Tensor, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of such a tensor as ``[N, C, ...]``. No tensor is made for it: a view costs
    the host up to 7 microseconds."""
    if size and t.is_contiguous():
        return (t.numel() // size, size), (size, 1)
    return t.shape, t.stride()


def _dense(t: Tensor, found: GroupRecipe, size: int) -> Tensor:
    return t.contiguous() if size else dense_like(t, found.dense)


def _form(size: int) -> torch.memory_format:
    return torch.contiguous_format if size else torch.preserve_format


def _twin(t: Tensor, found: GroupRecipe, size: int) -> Tensor:
    """An unwritten tensor for a result: like the input, in one of the two orders."""
    if size and not t.is_contiguous():
        return torch.empty_like(t, memory_format=_form(size))
    if found.reorders:
        return torch.empty_strided(t.shape, found.dense, dtype=t.dtype, device=t.device)
    return torch.empty_like(t)


def _result(t: Tensor, like: Tensor, found: GroupRecipe) -> Tensor:
    return torch.empty_like(like).copy_(t) if found.reorders else t


def _forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    centred: bool,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
    size: int,
) -> tuple[Tensor, Maybe, Tensor]:
    """With a ``size``, rows of so many neighbours are normalized, one group each; else ``input`` is
    ``[N, C, ...]``."""
    x = _rows(input, size)
    found = recipe(
        *("forward", *_seen(x, size), input.dtype, Device.of(input.device), forced()),
        *(groups, centred, activation, tuple(activation_args), residual is not None),
    )
    mean, rstd = _statistics(input, found.problem.statistics, centred)
    y = _twin(input, found, size)
    found.run(
        GroupForward(
            x=_twin(x, found, size).copy_(x) if found.copies else x,
            y=y,
            mean=mean,
            rstd=rstd,
            residual=None if residual is None else _dense(residual, found, size),
            weight=vector_of(weight),
            bias=vector_of(bias),
            eps=eps,
        )
    )
    return _result(y, input, found), mean, rstd


def _statistics(x: Tensor, size: int, centred: bool) -> tuple[Maybe, Tensor]:
    """Unwritten mean (None where there is none) and rstd."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = x.new_empty(size, dtype=wide)
    return torch.empty_like(rstd) if centred else None, rstd


def _backward(
    grad: Tensor,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    groups: int,
    centred: bool,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
    size: int,
) -> tuple[Maybe, Maybe, Maybe, Maybe]:
    """``needs``: which of dinput, dresidual, dweight, dbias to compute; the others are None.
    Without an activation dresidual is a copy of grad."""
    by_kernel = (needs[0], needs[1] and bool(activation), needs[2], needs[3])
    dx = dresidual = dweight = dbias = None
    if any(by_kernel):
        x = _rows(input, size)
        found = recipe(
            *("backward", *_seen(x, size), input.dtype, Device.of(input.device)),
            *(forced(), groups, centred, activation, tuple(activation_args)),
            *(residual is not None, by_kernel),
        )
        dx = _twin(input, found, size) if by_kernel[0] else None
        dresidual = _twin(input, found, size) if by_kernel[1] else None
        dweight = torch.empty_like(weight) if needs[2] and weight is not None else None
        dbias = torch.empty_like(bias) if needs[3] and bias is not None else None
        found.run(
            GroupBackward(
                dy=_dense(grad, found, size),
                x=_twin(x, found, size).copy_(x) if found.copies else x,
                mean=mean if centred else None,
                rstd=rstd,
                residual=None if residual is None else _dense(residual, found, size),
                weight=vector_of(weight),
                bias=vector_of(bias),
                dx=dx,
                dresidual=dresidual,
                dweight=dweight,
                dbias=dbias,
            )
        )
        dx = None if dx is None else _result(dx, input, found)
        dresidual = None if dresidual is None else _result(dresidual, input, found)
    if needs[1] and not activation:
        dresidual = torch.empty_like(input, memory_format=_form(size)).copy_(grad)
    return dx, dresidual, dweight, dbias


def _update(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    rstd: Tensor,
    count: int,
    momentum: float,
    eps: float,
) -> None:
    """Move the running statistics ``[C]`` towards the means over the samples of the mean and the
    unbiased variance of each instance ``[N * C]`` of ``count`` values."""
    torch.autograd.graph.increment_version([running_mean, running_var])
    shape = (-1, running_mean.numel())
    var = (rstd.square().reciprocal() - eps).clamp(min=0.0).reshape(shape).mean(0)
    running_mean.lerp_(mean.reshape(shape).mean(0).to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


implement(_library, "instance_norm_update", _update)
implement(_library, "group_norm", operator(_forward, 0))
implement(_library, "group_norm_backward", operator(_backward, 1))


@torch.library.register_fake("tritonnorm::group_norm", lib=_library)
def _(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    groups, centred, size = args[3], args[4], args[-1]
    y = torch.empty_like(input, memory_format=_form(size))
    statistics = input.numel() // size if size else input.shape[0] * groups
    return promised((y, *_statistics(input, statistics, centred)), input)


@torch.library.register_fake("tritonnorm::group_norm_backward", lib=_library)
def _(grad: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    needs, size = args[-2:]
    likes = (input, input, args[1], args[2])
    found = [
        torch.empty_like(t, memory_format=_form(size)) if needed and t is not None else None
        for t, needed in zip(likes, needs, strict=True)
    ]
    return promised(found, input)


@torch.library.register_fake("tritonnorm::instance_norm_update", lib=_library)
def _(*args: Any) -> None:
    return None


def forward(*args: Any) -> tuple[Tensor, Maybe, Tensor]:
    """`group_norm`. A mean that is not asked for may be None."""
    call = _forward if unwatched(*args[:4]) else torch.ops.tritonnorm.group_norm.default
    return call(*args)


def backward(*args: Any) -> tuple[Maybe, Maybe, Maybe, Maybe]:
    """`group_norm_backward`. What is not asked for may be None."""
    call = _backward if unwatched(*args[:7]) else torch.ops.tritonnorm.group_norm_backward.default
    return call(*args)
