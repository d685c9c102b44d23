"""Tiny planes as rows of all channels (`Problem.flat`): which blocks of them there are.

`split` and `affine` cut a row anywhere and leave sums for each column. `resident` and `persistent`
have blocks of whole planes, and sum over the columns of a channel themselves.
"""

from __future__ import annotations

import math
from typing import Any

from tritonnorm.problem import FEW_ROWS, Problem

from .base import Config, cdiv, next_power_of_2

WIDEST_ROW = 1024  # columns of a tile of tiny planes: 8 planes of 11 by 11


def in_rows(problem: Problem) -> tuple[Problem, int]:
    """A problem for passes that leave sums for each column, and columns of a channel: `flat` where
    there are so many rows that those are few."""
    if problem.plane == 1 or problem.view.n < FEW_ROWS:
        return problem, 1
    return problem.flat, problem.plane


def whole_planes(problem: Problem, config: Config) -> bool:
    """Whether a configuration of `resident` or `persistent` is for `Problem.flat`, not for the
    problem as it is."""
    return problem.plane > 1 and config.block_c >= 2 * problem.plane


def plane_widths(problem: Problem) -> list[int]:
    """How many channels' planes make wider accesses than one: of 16 bytes, 8, 4. With a mask at
    least as many as make whole bytes of it."""
    if problem.plane == 1:
        return []
    widest = min(problem.flat.vector, 16 // problem.dtype.itemsize)
    least = 8 // math.gcd(8, problem.plane) if problem.mask else 1
    found = [
        vector // problem.vector for vector in (16, 8, 4, 2) if problem.vector < vector <= widest
    ]
    return list(dict.fromkeys(max(width, least) for width in found))


def vector_of(problem: Problem, config: Config) -> int:
    """Neighbouring elements that an access can have, as `Problem.vector`: what divides the place of
    every block."""
    if not whole_planes(problem, config):
        return problem.vector
    size = channels_of_block(problem, config) * problem.plane
    return min(problem.flat.vector, size & -size)


def seen_as(problem: Problem, config: Config) -> Problem:
    """What a configuration of `resident` or `persistent` is for: `Problem.flat`, or the problem.

    Raises:
        ValueError: a mask of rows of tiny planes would not come in whole bytes.
    """
    if problem.mask and problem.plane > 1:
        if channels_of_block(problem, config) * problem.plane % 8 or not whole_planes(
            problem, config
        ):
            raise ValueError(f"config: {config} has no whole bytes of a mask of {problem}")
    return problem.flat if whole_planes(problem, config) else problem


def geometry(problem: Problem, config: Config) -> dict[str, Any]:
    """`Config.geometry` of what a problem is seen as, with what the kernels of `resident` and
    `persistent` want to know of its planes."""
    return {
        **config.geometry(seen_as(problem, config)),
        "VEC": vector_of(problem, config),
        "PLANE": problem.plane if whole_planes(problem, config) else 1,
        "WIDTH": channels_of_block(problem, config),
    }


def blocks_of(problem: Problem, config: Config) -> int:
    """How many channel blocks `resident` or `persistent` has."""
    return cdiv(problem.view.c, channels_of_block(problem, config))


def channels_of_block(problem: Problem, config: Config) -> int:
    """Channels of a block of `resident` or `persistent`."""
    if not whole_planes(problem, config):
        return config.block_c
    return 1 << (config.block_c // problem.plane).bit_length() - 1


def row_widths(problem: Problem) -> list[tuple[Problem, int]]:
    """As what the problem may be seen, and columns of a block then, the best first: tiny planes of
    several channels in a row (`Problem.flat`), or it as it is. Accesses have 8 bytes at least,
    which is what a pipeline can copy."""
    if problem.view.channels_last:
        found = [(problem, width) for width in (16, 32, 64)]
    else:
        rows = [
            next_power_of_2(width * problem.plane)
            for width in plane_widths(problem)
            if width * problem.vector * problem.dtype.itemsize >= 8
        ]
        found = [(problem.flat, row) for row in rows if row <= WIDEST_ROW]
        if not (problem.mask and problem.plane > 1):  # a mask of rows goes with rows
            found.append((problem, 1))
    size = problem.dtype.itemsize
    return [each for each in found if each[0].vector * size >= 8]
