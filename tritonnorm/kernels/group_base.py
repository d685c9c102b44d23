"""What the algorithms for group norms share: arguments, sizes, and the last sum of a backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonnorm.norms.problem import GroupProblem

from ._group_combine import combine_parameters_kernel
from .base import Config, Launch, cdiv, next_power_of_2

PER = {"position": 0, "group": 1, "channel": 2}  # the constants of `_groups`
SECTOR = 32  # bytes that a GPU moves from DRAM at least
COMBINE_TILE = 1024  # elements of a [parts, channels] tile of the combine kernels


@dataclass(slots=True)
class GroupForward:
    """Tensors and scalars of a forward; x alone may have its own strides."""

    x: Tensor  # [N, C, P] any strides
    y: Tensor  # [N, C, P] dense, written
    mean: Tensor | None  # [statistics] accumulator dtype, written; None where not centred
    rstd: Tensor  # [statistics] accumulator dtype, written
    residual: Tensor | None  # [N, C, P] dense
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    eps: float


@dataclass(slots=True)
class GroupBackward:
    """Tensors of a backward; a gradient that is None is not computed."""

    dy: Tensor  # [N, C, P] dense
    x: Tensor  # [N, C, P] any strides
    mean: Tensor | None  # [statistics] accumulator dtype
    rstd: Tensor  # [statistics] accumulator dtype
    residual: Tensor | None  # [N, C, P] dense
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    dx: Tensor | None  # [N, C, P] dense, written
    dresidual: Tensor | None  # [N, C, P] dense, written
    dweight: Tensor | None  # [C] written
    dbias: Tensor | None  # [C] written


def group_sizes(problem: GroupProblem) -> tuple[int | None, ...]:
    """``(G, K, P, xs_n, xs_c, xs_p)``; the strides are None where x is dense."""
    view = problem.view
    return problem.groups, problem.channels, view.p, *(view.strides or (None, None, None))


def group_meta(problem: GroupProblem, config: Config, strips: bool) -> dict[str, Any]:
    """The compile-time arguments that describe tiles; ``strips``: programs have a group each."""
    return {
        "CENTRED": problem.centred,
        "VEC": problem.strip if strips else problem.vector,
        "BLOCK_C": config.block_c,
        "BLOCK_P": config.block_p,
        "CHANNELS_LAST": problem.view.channels_last,
    }


def combine_blocks(size: int) -> dict[str, int]:
    """Tiles for a combine of ``size`` results: 8 of them (a sector), more where they are so many
    that a thousand programs have work all the same."""
    block = max(8, min(COMBINE_TILE, next_power_of_2(cdiv(size, 1024))))
    return {"BLOCK_C": block, "BLOCK_S": COMBINE_TILE // block}


def combine_parameters_launch(
    problem: GroupProblem, parts: int
) -> Callable[[GroupBackward, torch.Tensor], None]:
    """`combine_parameters_kernel` over partial sums ``[2, parts, C]``."""
    c = problem.view.c
    blocks = combine_blocks(c)
    grid = (cdiv(c, blocks["BLOCK_C"]),)
    launch = Launch(combine_parameters_kernel, grid, (c, parts), 4, **blocks)

    def run(a: GroupBackward, partial: torch.Tensor) -> None:
        launch(partial, a.dweight, a.dbias)

    return run
