"""The operators of a batch norm over several ranks: one before and one after each collective.

``moments`` and ``apply_moments`` make up a forward, ``gradient_sums`` and ``apply_gradient_sums`` a
backward. None of them communicates, so a compiler sees the collective between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonnorm.device import Device
from tritonnorm.kernels import synced
from tritonnorm.kernels.base import (
    BackwardArguments,
    EpilogueArguments,
    ForwardArguments,
    made_for,
)
from tritonnorm.operators import implement
from tritonnorm.ops import dense_like, unwatched, vector_of
from tritonnorm.plan import Forced, forced, on_change
from tritonnorm.problem import Problem
from tritonnorm.recipe import activity, decided, view_of

_library = torch.library.Library("tritonnorm", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_EPILOGUE = "str activation, float[] activation_args"
_SAVED = (
    "Tensor grad, Tensor input, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor rstd"
)
for _schema in (
    "moments(Tensor input) -> Tensor",
    "apply_moments(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor moments, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    f"float? momentum, float eps, {_EPILOGUE}, bool save_mask) "
    "-> (Tensor output, Tensor mean, Tensor rstd, Tensor merged, Tensor mask)",
    f"gradient_sums({_SAVED}, {_EPILOGUE}, bool[] needs) "
    "-> (Tensor sums, Tensor dweight, Tensor dbias)",
    f"apply_gradient_sums({_SAVED}, Tensor? sums, Tensor count, {_EPILOGUE}, bool[] needs) "
    "-> (Tensor dinput, Tensor dresidual)",
):
    _library.define(_schema, tags=_tags)


class Stage(NamedTuple):
    """One of the four operators for tensors of a kind; fields as in `recipe.Recipe`."""

    run: Any
    problem: Problem
    dense: tuple[int, ...]
    copies: bool


@lru_cache(maxsize=16384)
def _stage(
    name: str,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: Device,
    overrule: Forced | None,
    activation: str = "",
    activation_args: tuple[float, ...] = (),
    residual: bool = False,
    mask: bool = False,
    needs: tuple[bool, bool, bool] = (False, False, False),  # dx, dresidual, dweight or dbias
    ranks: int = 1,
) -> Stage:
    """Made once for all calls that are alike. The plan is always one of `split`, and the two
    stages of a backward ask for the same."""
    view, dense, copies = view_of(sizes, strides)
    kind, forward = activity(activation), name in ("moments", "apply_moments")
    problem = Problem("forward", True, view, dtype, kind, residual, mask, form="synced")
    if not forward:
        dx, dresidual, dparams = needs
        problem = replace(
            problem,
            direction="backward",
            needs_dx=dx,
            needs_dresidual=dresidual,
            needs_dparams=dparams,
        )
    asked = replace(problem, needs_dx=True, needs_dresidual=False, needs_dparams=True)
    config = decided(asked, device, overrule).config
    epilogue = EpilogueArguments.named(activation, activation_args)
    run: Any
    with made_for((asked, device)):
        if name == "moments":
            run = synced.moments(problem, config)
        elif name == "apply_moments":
            run = synced.apply_moments(problem, config, epilogue, ranks)
        elif name == "gradient_sums":
            run = synced.gradient_sums(problem, config, epilogue)
        else:
            run = synced.apply_gradient_sums(problem, config, epilogue)
    return Stage(run, problem, dense, copies)


on_change(_stage.cache_clear)


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, Device.of(x.device), forced()


def _readable(x: Tensor, stage: Stage) -> Tensor:
    return torch.empty_like(x).copy_(x) if stage.copies else x


def _moments(input: Tensor) -> Tensor:
    stage = _stage("moments", *_kind(input))
    return stage.run(_readable(input, stage))


def _apply_moments(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
    save_mask: bool,
) -> tuple[Tensor, ...]:
    changed = [t for t in (running_mean, running_var, num_batches_tracked) if t is not None]
    torch.autograd.graph.increment_version(changed)
    stage = _stage(
        *("apply_moments", *_kind(input), activation, tuple(activation_args)),
        *(residual is not None, save_mask),
        ranks=moments.shape[0],
    )
    y = torch.empty_like(input)
    mean, rstd, mask = _unwritten(input, stage.problem)
    arguments = ForwardArguments(
        x=_readable(input, stage),
        y=y,
        mean=mean,
        rstd=rstd,
        residual=None if residual is None else dense_like(residual, stage.dense),
        mask=mask if save_mask else None,
        weight=vector_of(weight),
        bias=vector_of(bias),
        running_mean=running_mean,
        running_var=running_var,
        counter=num_batches_tracked,
        momentum=momentum,
        eps=eps,
    )
    return y, mean, rstd, stage.run(arguments, moments), mask


def _unwritten(x: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(problem.view.c, dtype=problem.accumulator)
    mask = x.new_empty(problem.mask_room if problem.mask else 0, dtype=torch.uint8)
    return mean, torch.empty_like(mean), mask


def _arguments(
    stage: Stage,
    saved: Sequence[Tensor | None],
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> BackwardArguments:
    grad, x, residual, mask, weight, bias, mean, rstd = saved
    assert grad is not None and x is not None and mean is not None and rstd is not None
    return BackwardArguments(
        dense_like(grad, stage.dense),
        _readable(x, stage),
        mean,
        rstd,
        None if residual is None else dense_like(residual, stage.dense),
        mask,
        vector_of(weight),
        vector_of(bias),
        *outputs,
    )


def _gradient_stage(
    name: str,
    saved: Sequence[Any],
    activation: str,
    activation_args: Sequence[float],
    needs: tuple[bool, bool, bool],
) -> Stage:
    _, x, residual, mask, *_ = saved
    return _stage(
        *(name, *_kind(x), activation, tuple(activation_args)),
        *(residual is not None or mask is not None, mask is not None, needs),
    )


def _gradient_sums(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``needs``: dweight, dbias; what is not needed comes back empty."""
    *saved, activation, activation_args, needs = args
    stage = _gradient_stage(
        "gradient_sums", saved, activation, activation_args, (True, False, True)
    )
    dweight, dbias = _parameter_gradients(*saved[1:], needs)
    outputs = (None, None, dweight if needs[0] else None, dbias if needs[1] else None)
    return stage.run(_arguments(stage, saved, outputs)), dweight, dbias


def _parameter_gradients(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, bias, needs = args[2], args[3], args[-1]
    return (
        torch.empty_like(weight) if needs[0] else x.new_empty(0),
        torch.empty_like(bias) if needs[1] else x.new_empty(0),
    )


def _apply_gradient_sums(*args: Any) -> tuple[Tensor, Tensor]:
    """``needs``: dinput, dresidual; what is not needed comes back empty."""
    *saved, sums, count, activation, activation_args, needs = args
    stage = _gradient_stage(
        "apply_gradient_sums", saved, activation, activation_args, (*needs, False)
    )
    outputs = dx, dresidual = _input_gradients(saved[1], needs)
    written = (dx if needs[0] else None, dresidual if needs[1] else None, None, None)
    stage.run(_arguments(stage, saved, written), sums, count)
    return outputs


def _input_gradients(x: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    dx, dresidual = (torch.empty_like(x) if n else x.new_empty(0) for n in needs)
    return dx, dresidual


_IMPLEMENTATIONS: dict[str, Any] = {
    "moments": _moments,
    "apply_moments": _apply_moments,
    "gradient_sums": _gradient_sums,
    "apply_gradient_sums": _apply_gradient_sums,
}
for _name, _implementation in _IMPLEMENTATIONS.items():
    implement(_library, _name, _implementation)


def _problem(x: Tensor, mask: bool = False) -> Problem:
    return Problem("forward", True, view_of(x.shape, x.stride())[0], x.dtype, mask=mask)


@torch.library.register_fake("tritonnorm::moments", lib=_library)
def _(input: Tensor) -> Tensor:
    return input.new_empty((3, input.shape[1]), dtype=_problem(input).accumulator)


@torch.library.register_fake("tritonnorm::apply_moments", lib=_library)
def _(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    y = torch.empty_like(input)
    mean, rstd, mask = _unwritten(input, _problem(y, args[-1]))
    return y, mean, rstd, mean.new_empty((3, input.shape[1])), mask


@torch.library.register_fake("tritonnorm::gradient_sums", lib=_library)
def _(grad: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    rstd = args[5]
    return rstd.new_empty((2, input.shape[1])), *_parameter_gradients(input, *args)


@torch.library.register_fake("tritonnorm::apply_gradient_sums", lib=_library)
def _(grad: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _input_gradients(input, args[-1])


def call(name: str, *args: Any) -> Any:
    """An operator by name, past the dispatcher where nobody looks."""
    if unwatched(*(t for t in args if isinstance(t, Tensor))):
        return _IMPLEMENTATIONS[name](*args)
    return getattr(torch.ops.tritonnorm, name).default(*args)
