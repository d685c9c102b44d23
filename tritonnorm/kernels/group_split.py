"""Any size: a group is shared by as many programs as fill the device.

Forward: partial moments -> combine -> apply; x is read twice and y written once (3S). Backward:
partial sums -> combine -> gradients with the sums for dweight and dbias -> combine; x and dy are
read twice and dx written once (5S). The second pass walks in reverse, so what still lies in the L2
cache is not read from DRAM again. Everything is combined in a fixed order, without atomics.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tritonnorm.device import Device
from tritonnorm.norms.problem import GroupProblem, minimum_group_bytes

from ._group_combine import combine_moments_kernel, combine_sums_kernel
from ._group_split import apply_kernel, gradient_kernel, moments_kernel, sums_kernel
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
    GroupBackward,
    GroupForward,
    combine_blocks,
    combine_parameters_launch,
    group_meta,
    group_sizes,
)
from .tiling import power_of_two_blocks

# Bytes of x in a tile, with 4 warps: two 16-byte loads a thread. Half of what `split` takes: a tile
# has the statistics of its rows or channels besides. With twice as many the compile audit finds
# spills in float32 on sm_80.
TILE_BYTES = 4096
PROGRAMS_PER_SM = 8  # as in `streaming`


class GroupSplit:
    """Two streaming passes with a small combine between them."""

    name = "group_split"

    def supports(self, problem: GroupProblem, device: Device) -> str | None:
        return None

    def heuristic(self, problem: GroupProblem, device: Device) -> Config:
        return _tiled(problem, device, _tile_elements(problem), num_warps=4)

    def configs(self, problem: GroupProblem, device: Device) -> list[Config]:
        usual = _tile_elements(problem)
        found = [_tiled(problem, device, usual, 4)]
        found += [_tiled(problem, device, usual // 2, 4), _tiled(problem, device, usual * 2, 8)]
        return list(dict.fromkeys(found))

    def model_bytes(self, problem: GroupProblem, config: Config) -> int:
        """One pass more over everything that the statistics or the sums of dx depend on."""
        once = minimum_group_bytes(problem)
        if problem.direction == "forward":
            return once + problem.bytes
        return once + problem.needs_dx * (2 + problem.reads_residual) * problem.bytes

    def predict(self, problem: GroupProblem, config: Config, device: Device) -> float:
        """What the second pass reads again comes from the L2 cache as far as it fits there."""
        once = minimum_group_bytes(problem)
        again = self.model_bytes(problem, config) - once
        dram = once + max(0, again - device.l2_bytes)
        programs = cdiv(problem.view.c, config.block_c) * _splits(problem, config)[0]
        launches = 3 + (problem.direction == "backward" and problem.needs_dparams)
        return predicted_seconds(device, dram, programs, launches)

    def forward(
        self, problem: GroupProblem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[GroupForward], None]:
        blocks, splits, sizes = _over_sums(problem, config)
        meta = _meta(problem, config)
        moments = Launch(
            moments_kernel, (blocks, splits), sizes, config.num_warps, keeps=True, **meta
        )
        combine = _combine(combine_moments_kernel, problem, splits)
        grid, apply_sizes = _over_chunks(problem, config)
        act = {k: v for k, v in epilogue.forward().items() if k != "GATE"}
        apply = Launch(apply_kernel, grid, apply_sizes, config.num_warps, **act, **meta)

        def run(a: GroupForward) -> None:
            partial = a.rstd.new_empty((3, splits, sizes[-1]))
            moments(a.x, partial)
            combine(partial, a.mean, a.rstd, a.eps)
            apply(a.x, a.y, a.residual, a.mean, a.rstd, a.weight, a.bias)

        return run

    def backward(
        self, problem: GroupProblem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[GroupBackward], None]:
        blocks, splits, sizes = _over_sums(problem, config)
        meta = {**epilogue.backward(), **_meta(problem, config)}
        first = Launch(sums_kernel, (blocks, splits), sizes, config.num_warps, **meta)
        combine = _combine(combine_sums_kernel, problem, splits)
        grid, chunk_sizes = _over_chunks(problem, config)
        chunk_sizes = (problem.statistics, *chunk_sizes)
        second = Launch(gradient_kernel, grid, chunk_sizes, config.num_warps, **meta)
        parameters = combine_parameters_launch(problem, grid[1])

        def run(a: GroupBackward) -> None:
            whole = part = None
            if a.dx is not None:
                partial = a.rstd.new_empty((2, splits, sizes[-1]))
                whole = a.rstd.new_empty((2, problem.statistics))
                first(a.dy, a.x, a.residual, a.mean, a.rstd, a.weight, a.bias, partial)
                combine(partial, whole)
            if problem.needs_dparams:
                part = a.rstd.new_empty((2, grid[1], problem.view.c))
            second(
                *(a.dy, a.x, a.residual, a.dx, a.dresidual, a.mean, a.rstd, a.weight, a.bias),
                *(whole, part),
            )
            if part is not None:
                parameters(a, part)

        return run


def _tile_elements(problem: GroupProblem) -> int:
    return TILE_BYTES // problem.dtype.itemsize


def _tiled(problem: GroupProblem, device: Device, elements: int, num_warps: int) -> Config:
    """Tiles of about `elements` with long contiguous runs, and splits that fill the device."""
    view = problem.view
    if problem.rows:
        block_c = power_of_two_blocks(view.c, elements, 64)
        block_p = min(next_power_of_2(view.p), max(1, elements // block_c))
    elif view.channels_last:
        block_c = min(next_power_of_2(view.c), 64)
        block_p = min(next_power_of_2(view.p), max(1, elements // block_c))
    else:
        block_p = power_of_two_blocks(view.p, elements, 64)
        block_c = min(next_power_of_2(view.c), max(1, elements // block_p))
    config = Config(block_c, 1, block_p, num_warps=num_warps)
    blocks = cdiv(view.c, block_c)
    splits = cdiv(device.sms * PROGRAMS_PER_SM, blocks)
    return replace(config, splits=max(1, min(splits, _chunks(problem, config))))


def _chunks(problem: GroupProblem, config: Config) -> int:
    """Tiles of one channel block."""
    return problem.view.n * cdiv(problem.view.p, config.block_p)


def _splits(problem: GroupProblem, config: Config) -> tuple[int, int, int]:
    """``(splits, chunks per split, chunks)`` of the passes over channel blocks."""
    chunks = _chunks(problem, config)
    per_split = cdiv(chunks, min(config.splits, chunks))
    return cdiv(chunks, per_split), per_split, chunks


def _over_chunks(
    problem: GroupProblem, config: Config
) -> tuple[tuple[int, int], tuple[int | None, ...]]:
    """Grid and sizes of a pass whose programs are channel blocks by splits."""
    splits, per_split, chunks = _splits(problem, config)
    grid = cdiv(problem.view.c, config.block_c), splits
    return grid, (*group_sizes(problem), per_split, chunks)


def _over_sums(problem: GroupProblem, config: Config) -> tuple[int, int, tuple[Any, ...]]:
    """Blocks of sums, splits of each, and sizes of a pass that sums.

    As many programs in all as a pass over channel blocks has. The last size is the number of sums.
    """
    view = problem.view
    blocks, chunks = view.n * cdiv(view.c, config.block_c), cdiv(view.p, config.block_p)
    sums = view.n * view.c
    if problem.rows:
        blocks, chunks, sums = chunks, blocks, view.p
    programs = cdiv(view.c, config.block_c) * config.splits
    per_split = cdiv(chunks, max(1, min(chunks, cdiv(programs, blocks))))
    return blocks, cdiv(chunks, per_split), (*group_sizes(problem), per_split, chunks, sums)


def _combine(kernel: Any, problem: GroupProblem, splits: int) -> Launch:
    of_group = 1 if problem.rows else problem.channels
    sizes = (splits, of_group, problem.statistics)
    blocks = combine_blocks(problem.statistics)
    grid = (cdiv(problem.statistics, blocks["BLOCK_C"]),)
    return Launch(kernel, grid, sizes, 4, **blocks)


def _meta(problem: GroupProblem, config: Config) -> dict[str, Any]:
    per = PER["position" if problem.rows else "channel"]
    return {"PER": per, **group_meta(problem, config, strips=False)}
