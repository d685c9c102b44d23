"""A recipe: everything about a call that does not depend on the contents of its tensors.

It is worked out once per kind of call, and found by one look-up in all later ones. The way from a
tensor to its kernels: shapes and strides -> `View` -> `Problem` -> `plan.plan` -> launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch

from . import settings
from .activation import ACTIVATIONS, PRELU
from .device import INTERPRETER, Device, on_simulation
from .kernels.base import EpilogueArguments, made_for
from .norms.problem import GroupProblem
from .plan import Forced, Plan, on_change, plan
from .problem import Activity, Problem, View
from .tune.key import Shape
from .tune.standing import SEEN


def activity(activation: str) -> Activity:
    """The kind of an activation by name; "" is none.

    A prelu is smooth to a plan: its slope needs the pre-activation and not only its sign.
    """
    if not activation:
        return "none"
    if activation == PRELU.name:
        return "smooth"
    return "two_valued" if ACTIVATIONS[activation].two_valued else "smooth"


def view_of(sizes: Any, strides: Any) -> tuple[View, tuple[int, ...], bool]:
    """The view of a tensor, the strides of its dense twin, and whether the tensor has no view of
    its own, so that it has to be copied to that twin."""
    tensor = torch.empty_strided(sizes, strides, device="meta")
    dense = torch.empty_like(tensor).stride()
    view = View.of(sizes, strides, dense)
    copies = view is None
    if view is None:
        view = View.of(sizes, dense, dense)
        assert view is not None  # dense
    return view, dense, copies


class Recipe(NamedTuple):
    """Everything about a call that does not depend on the contents of its tensors.

    Attributes:
        run: launches the kernels of the plan.
        plan: the algorithm and its configuration.
        problem: what they compute.
        dense: strides of a dense twin of the input.
        copies: whether the input has no view, and a dense copy of it is computed on.
    """

    run: Callable[[Any], None]
    plan: Plan
    problem: Problem
    dense: tuple[int, ...]
    copies: bool


def described(
    direction: Literal["forward", "backward"],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    batch_statistics: bool,
    activation: str,
    residual: bool,
    mask: bool,
    needs: tuple[bool, ...] = (),
) -> tuple[Problem, tuple[int, ...], bool]:
    """The problem of a call, strides of a dense twin of the input, and whether it is copied."""
    view, dense, copies = view_of(sizes, strides)
    kind = activity(activation)
    problem = Problem(direction, batch_statistics, view, dtype, kind, residual, mask)
    if direction == "backward":
        dx, dresidual, *dparams = needs
        problem = replace(
            problem, needs_dx=dx, needs_dresidual=dresidual, needs_dparams=any(dparams)
        )
    return problem, dense, copies


def decided(problem: Shape, device: Device, forced: Forced | None = None) -> Plan:
    """The plan of a problem; where TRITONNORM_TUNE asks for it, the problem is tuned first."""
    chosen = plan(problem, device, forced)
    if forced is not None or device.arch == INTERPRETER.arch:
        return chosen
    mode = settings.tune_mode()
    if mode == "force" or (mode == "on" and chosen.source not in SEEN):
        from .tune import online

        return online.tuned(problem, device, chosen)
    return chosen


def prepared(
    problem: Problem | GroupProblem,
    device: Device,
    chosen: Plan,
    activation: str,
    activation_args: tuple[float, ...],
    one_kind: bool = False,
) -> Callable[[Any], None]:
    """What launches the kernels of a plan; of ``one_kind`` as in `made_for`."""
    algorithm: Any = chosen.runs
    make = algorithm.forward if problem.direction == "forward" else algorithm.backward
    epilogue = EpilogueArguments.named(activation, activation_args)
    with made_for((problem, device), one_kind):
        run: Callable[[Any], None] = make(problem, chosen.config, epilogue)
    return run


@lru_cache(maxsize=16384)
def recipe(
    direction: Literal["forward", "backward"],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: Device,
    forced: Forced | None,
    batch_statistics: bool,
    activation: str,
    activation_args: tuple[float, ...],
    residual: bool,
    mask: bool,
    needs: tuple[bool, ...] = (),
    known: tuple[Any, ...] | None = None,
) -> Recipe:
    """Made once for all calls that are alike; if they have a place in `of_kinds`, put there too."""
    problem, dense, copies = described(
        direction, sizes, strides, dtype, batch_statistics, activation, residual, mask, needs
    )
    chosen = decided(problem, device, forced)
    one_kind = known is not None
    run = prepared(problem, device, chosen, activation, activation_args, one_kind)
    found = Recipe(run, chosen, problem, dense, copies)
    if known is not None:
        if len(of_kinds) >= MOST:
            recipe.cache_clear()
            of_kinds.clear()
        of_kinds[known] = found
    return found


MOST = 16384  # shapes that change all the time must not fill memory
# `conditions.Kind`, and what it does not tell of a call -> the recipe of that kind alone. It takes
# half of the instructions of `recipe` to find.
of_kinds: dict[tuple[Any, ...], Recipe] = {}
on_change(recipe.cache_clear)
on_change(of_kinds.clear)
on_simulation(recipe.cache_clear)
on_simulation(of_kinds.clear)
