"""A group stays in the registers of one program: one read, one write.

Forward moves 2S in one launch. Backward moves 3S; its programs keep the sums for dweight and dbias
of the groups they walk over, and a small launch adds those of all programs in a fixed order.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tritonnorm.device import Device
from tritonnorm.norms.problem import GroupProblem, minimum_group_bytes

from ._group_resident import backward_kernel, forward_kernel
from .base import (
    Config,
    EpilogueArguments,
    Launch,
    cdiv,
    next_power_of_2,
    predicted_seconds,
)
from .group_base import (
    PER,
    SECTOR,
    GroupBackward,
    GroupForward,
    combine_parameters_launch,
    group_meta,
    group_sizes,
)
from .tiling import power_of_two_blocks

# Warps of a program -> 32-bit registers a thread may spend on what it keeps; with 16 warps it has
# 128 at the most. The compile audit shows no spill within them on sm_80, sm_90, sm_100 and gfx942.
PAYLOAD = {1: 32, 2: 32, 4: 64, 8: 64, 16: 40}
PAYLOAD_BACKWARD = {1: 32, 2: 32, 4: 40, 8: 60, 16: 24}
PAYLOAD_OF_ONE_TILE = 56  # the same with 16 warps where nothing else has to be addressed
TILE = 4096  # elements of a chunk
ROW_TILE = 2048  # elements of a tile of short rows
# Warps that the programs of a backward have on each multiprocessor: more of them would lengthen the
# combine.
WARPS_PER_SM = 16


def registers_kept(problem: GroupProblem) -> float:
    """32-bit registers that one element of a tile occupies: x as it is; in backward g too, and for
    rows the two sums."""
    own, sums = problem.dtype.itemsize / 4, problem.accumulator.itemsize / 4
    if problem.direction == "forward":
        return own
    return own + sums + (2 * sums if problem.rows and problem.needs_dparams else 0)


def extents_of(problem: GroupProblem, config: Config) -> tuple[int, int]:
    """Channels and positions that one program holds."""
    view = problem.view
    if problem.rows:
        return view.c, config.block_p
    return (config.block_c if problem.per == "channel" else problem.channels), view.p


def chunks_of(problem: GroupProblem, config: Config) -> tuple[int, int]:
    """Tiles of a program, along channels and along positions."""
    c, p = extents_of(problem, config)
    return cdiv(c, config.block_c), cdiv(p, config.block_p)


def blocks_of(problem: GroupProblem, config: Config) -> int:
    """Programs that share a sample (1 for rows)."""
    if problem.per == "group":
        return problem.groups
    return 1 if problem.rows else cdiv(problem.view.c, config.block_c)


def steps_of(problem: GroupProblem, config: Config) -> int:
    """Samples, or blocks of rows."""
    return cdiv(problem.view.p, config.block_p) if problem.rows else problem.view.n


def tile_of(problem: GroupProblem, threads: int, device: Device) -> tuple[int, int]:
    """``(block_c, block_p)``: about `TILE` elements with little padding; several short rows or
    small channels in one program, as long as the programs fill the device."""
    view = problem.view
    least = threads * 16 // problem.dtype.itemsize
    limit = max(TILE, least)
    if problem.rows:
        block_c = next_power_of_2(view.c)
        if problem.direction == "forward":
            block_c = min(block_c, power_of_two_blocks(view.c, limit, 1024))
        return block_c, _several(ROW_TILE // block_c, view.p, device.sms)
    extent = view.c if problem.per == "channel" else problem.channels
    if view.channels_last:
        block_c = min(next_power_of_2(extent), 16)
        if problem.per == "group":
            block_c = power_of_two_blocks(extent, 64, 16)
        return block_c, power_of_two_blocks(view.p, limit // block_c, max(1, least // block_c))
    block_p = power_of_two_blocks(view.p, limit, 64)
    if problem.per == "channel":
        return _several(ROW_TILE // block_p, extent, cdiv(device.sms, view.n)), block_p
    return power_of_two_blocks(extent, limit // block_p, 1), block_p


def _several(most: int, extent: int, programs: int) -> int:
    """How many of an extent one program takes, so that that many programs remain."""
    return max(
        1, min(most, next_power_of_2(extent), 1 << max(1, extent // programs).bit_length() - 1)
    )


class GroupResident:
    """One program holds a group, a block of rows, or a block of channels."""

    name = "group_resident"

    def supports(self, problem: GroupProblem, device: Device) -> str | None:
        if self._fitting(problem, device) is None:
            return "a group does not fit the registers of one program"
        return None

    def heuristic(self, problem: GroupProblem, device: Device) -> Config:
        config = self._fitting(problem, device)
        if config is None:
            raise ValueError(f"problem: does not fit: {problem}")
        return config

    def configs(self, problem: GroupProblem, device: Device) -> list[Config]:
        first = self.heuristic(problem, device)
        found = [first]
        if first.block_p > 1 and problem.rows:
            found.append(replace(first, block_p=first.block_p // 2))
        if first.num_warps < 8:
            found.append(replace(first, num_warps=first.num_warps * 2))
        return [self._parted(problem, device, config) for config in found]

    def model_bytes(self, problem: GroupProblem, config: Config) -> int:
        return minimum_group_bytes(problem)

    def predict(self, problem: GroupProblem, config: Config, device: Device) -> float:
        """Strips narrower than a sector are fetched in whole sectors."""
        moved, view = minimum_group_bytes(problem), problem.view
        if view.channels_last and not problem.rows:
            width = problem.channels if problem.per == "group" else config.block_c
            moved = moved * max(1, SECTOR // (width * problem.dtype.itemsize))
        backward = problem.direction == "backward"
        programs = blocks_of(problem, config) * (
            config.splits if backward else steps_of(problem, config)
        )
        launches = 1 + (backward and problem.needs_dparams)
        return predicted_seconds(device, moved, programs, launches)

    def _fitting(self, problem: GroupProblem, device: Device) -> Config | None:
        """The smallest program that holds a group, or None."""
        kept = registers_kept(problem)
        payloads = PAYLOAD if problem.direction == "forward" else PAYLOAD_BACKWARD
        for warps, payload in payloads.items():
            threads = warps * device.warp
            block_c, block_p = tile_of(problem, threads, device)
            config = Config(block_c, 1, block_p, num_warps=warps)
            chunks = math.prod(chunks_of(problem, config))
            if warps == 16 and chunks == 1:
                payload = PAYLOAD_OF_ONE_TILE
            if chunks * config.tile * kept <= payload * threads:
                return self._parted(problem, device, config)
        return None

    def _parted(self, problem: GroupProblem, device: Device, config: Config) -> Config:
        """With the programs that share the steps of a backward."""
        steps = steps_of(problem, config)
        accumulates = problem.needs_dparams and chunks_of(problem, config)[0] == 1
        if problem.direction == "forward" or not accumulates:
            return replace(config, splits=steps if problem.direction == "backward" else 1)
        wanted = device.sms * max(1, WARPS_PER_SM // config.num_warps)
        return replace(config, splits=min(steps, cdiv(wanted, blocks_of(problem, config))))

    def forward(
        self, problem: GroupProblem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[GroupForward], None]:
        blocks = blocks_of(problem, config)
        launch = Launch(
            forward_kernel,
            (blocks * steps_of(problem, config),),
            (*group_sizes(problem), blocks),
            config.num_warps,
            **{k: v for k, v in epilogue.forward().items() if k != "GATE"},
            **self._meta(problem, config),
        )

        def run(a: GroupForward) -> None:
            launch(a.x, a.y, a.residual, a.mean, a.rstd, a.weight, a.bias, a.eps)

        return run

    def backward(
        self, problem: GroupProblem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[GroupBackward], None]:
        blocks, steps = blocks_of(problem, config), steps_of(problem, config)
        per_part = 1
        if chunks_of(problem, config)[0] == 1:
            per_part = cdiv(steps, min(config.splits, steps))
        parts = cdiv(steps, per_part)
        launch = Launch(
            backward_kernel,
            (blocks * parts,),
            (*group_sizes(problem), blocks, steps, per_part),
            config.num_warps,
            keeps=True,
            **epilogue.backward(),
            **self._meta(problem, config),
        )
        combine = combine_parameters_launch(problem, parts)
        sums = problem.needs_dparams

        def run(a: GroupBackward) -> None:
            partial = a.rstd.new_empty((2, parts, problem.view.c)) if sums else None
            launch(
                *(a.dy, a.x, a.residual, a.dx, a.dresidual, a.mean, a.rstd, a.weight, a.bias),
                partial,
            )
            if partial is not None:
                combine(a, partial)

        return run

    def _meta(self, problem: GroupProblem, config: Config) -> dict[str, Any]:
        chunks_c, chunks_p = chunks_of(problem, config)
        return {
            "CHUNKS_C": chunks_c,
            "CHUNKS_P": chunks_p,
            "PER": PER[problem.per],
            **group_meta(problem, config, strips=problem.per == "group"),
        }
