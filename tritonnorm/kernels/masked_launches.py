"""The launches of `masked`: tiles and splits by formula, and the kernels in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton.language as tl
from torch import Tensor

from tritonnorm.device import Device
from tritonnorm.problem import Problem, minimum_bytes

from . import masked
from .base import (
    BackwardArguments,
    Config,
    EpilogueArguments,
    ForwardArguments,
    Launch,
    cdiv,
    next_power_of_2,
)
from .split import Split
from .streaming import COMBINE, combine_sums_launch, partial_sums
from .tiling import PROGRAMS_PER_SM, TILE, TILE_FLOAT64, power_of_two_blocks, splits_for

# Positions of a tile of [N, C, L] data: 1 KiB of 16-bit values. The rest of the tile is channels,
# which share one reading of the mask.
ROW = 512


@dataclass(slots=True, kw_only=True)  # those that it adds have no defaults
class MaskedForward(ForwardArguments):
    """Those of a batch norm, without residual and its mask; x is dense."""

    keep: Tensor  # uint8 [N, P], 0 is padding
    count: Tensor | None  # [1] accumulator dtype, valid positions, written; or None: not counted


@dataclass(slots=True, kw_only=True)  # those that it adds have no defaults
class MaskedBackward(BackwardArguments):
    """The same. Without a count the statistics were given."""

    keep: Tensor  # uint8 [N, P]
    count: Tensor | None  # [1] accumulator dtype


class Masked(Split):
    """`split` over valid positions, of which only the GPU knows how many there are.

    Bytes and times are those of a batch without padding; a tile that is all padding is not read.
    """

    name = "masked"

    def supports(self, problem: Problem, device: Device) -> str | None:
        return None

    def heuristic(self, problem: Problem, device: Device) -> Config:
        """Tiles of half the elements that `streaming` takes, and splits that fill the device.

        With 4096 the compile audit finds 16 spills on gfx942 (mish in float32, backward).
        """
        return _tiled(problem, device, _elements(problem), PROGRAMS_PER_SM)

    def configs(self, problem: Problem, device: Device) -> list[Config]:
        usual = _elements(problem)
        found = [
            replace(_tiled(problem, device, elements, programs), num_warps=warps)
            for elements, warps in ((usual, 4), (usual // 2, 4), (usual * 2, 8))
            for programs in (PROGRAMS_PER_SM, PROGRAMS_PER_SM // 4)
        ]
        return list(dict.fromkeys(found))

    def model_bytes(self, problem: Problem, config: Config) -> int:
        if not problem.batch_statistics:
            return minimum_bytes(problem)
        return super().model_bytes(problem, config)

    def forward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[MaskedForward], None]:  # type: ignore[override]
        act = {k: v for k, v in epilogue.forward().items() if k != "GATE"}
        wide = problem.accumulator == torch.float64
        apply = _over_chunks(
            *(masked.masked_apply_kernel, problem, config),
            **act,
            FROM_VARIANCE=not problem.batch_statistics,
            ACC=tl.float64 if wide else tl.float32,
        )
        if not problem.batch_statistics:

            def given(a: MaskedForward) -> None:
                statistics = (a.running_mean, a.running_var)
                apply(a.x, a.keep, a.y, *statistics, a.weight, a.bias, a.mean, a.rstd, a.eps)

            return given
        c, splits = problem.view.c, splits_for(config, problem)[0]
        moments = _over_chunks(masked.masked_moments_kernel, problem, config)
        grid = (cdiv(c, COMBINE["BLOCK_C"]),)
        kernel = masked.combine_masked_moments_kernel
        combine = [
            Launch(kernel, grid, (c, splits), 4, CUMULATIVE=cumulative, **COMBINE)
            for cumulative in (False, True)
        ]

        def run(a: MaskedForward) -> None:
            assert a.mean is not None
            cumulative = a.momentum is None and a.counter is not None
            if cumulative and a.counter is not None:
                a.counter.add_(a.keep.sum() > 1)  # before what reads it; without a host wait
            partial = a.mean.new_empty((3, splits, c))
            moments(a.x, a.keep, partial)
            combine[cumulative](
                *(partial, a.mean, a.rstd, a.count, a.running_mean, a.running_var, a.counter),
                *(a.eps, 0.0 if a.momentum is None else a.momentum),
            )
            apply(a.x, a.keep, a.y, a.mean, a.rstd, a.weight, a.bias, None, None, a.eps)

        return run

    def backward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[MaskedBackward], None]:  # type: ignore[override]
        sums = problem.sums
        corrects = problem.batch_statistics and problem.needs_dx
        gradient = _over_chunks(
            *(masked.masked_gradient_kernel, problem, config),
            **epilogue.backward(),
            READS_X=sums or problem.activity != "none",
        )
        combine = combine_sums_launch(problem, config)

        def run(a: MaskedBackward) -> None:
            vectors = (a.mean, a.rstd, a.weight, a.bias)
            whole = None
            if sums:
                partial = partial_sums(problem, config, a)
                early = None if corrects else a.dx  # of given statistics all is one pass
                gradient(a.dy, a.x, a.keep, early, *vectors, partial, None, None)
                whole = a.rstd.new_empty((2, problem.view.c)) if corrects else None
                combine(a, partial, whole)
            if a.dx is not None and (corrects or not sums):
                gradient(a.dy, a.x, a.keep, a.dx, *vectors, None, whole, a.count)

        return run


def _elements(problem: Problem) -> int:
    return TILE_FLOAT64 if problem.dtype == torch.float64 else TILE // 2


def _tiled(problem: Problem, device: Device, elements: int, programs_per_sm: int) -> Config:
    """A tile of so many elements, and splits for so many programs on each multiprocessor."""
    view, block_n = problem.view, 1
    if view.channels_last:
        block_c = min(64, next_power_of_2(view.c))
        block_p = min(next_power_of_2(view.p), elements // block_c)
    else:
        block_p = power_of_two_blocks(view.p, min(ROW, elements), 64)
        block_c = min(next_power_of_2(view.c), max(1, elements // block_p), 8)
        block_n = min(next_power_of_2(view.n), max(1, elements // (block_p * block_c)))
    config = Config(block_c, block_n, block_p)
    wanted = cdiv(device.sms * programs_per_sm, config.channel_blocks(problem))
    return replace(config, splits=max(1, min(wanted, config.chunks(problem))))


def _over_chunks(kernel: object, problem: Problem, config: Config, **meta: object) -> Launch:
    """A kernel whose programs are channel blocks by splits."""
    splits, per_split, chunks = splits_for(config, problem)
    view, grid = problem.view, (config.channel_blocks(problem), splits)
    sizes = (view.n, view.c, view.p, per_split, chunks)
    return Launch(kernel, grid, sizes, config.num_warps, **meta, **config.geometry(problem))
