"""Any size, any channel count: a channel is shared by as many programs as fill the device.

Forward: partial moments per split -> combine -> apply; x is read twice and y written once (3S).
Backward: partial sums -> combine -> gradients; x and dy are read twice and dx written once (5S).
The second pass walks in reverse, so what still lies in the L2 cache is not read from DRAM again.
Everything is combined in a fixed order, without atomics: the same plan gives the same bits. Tiny
planes are read as rows of all channels (`Problem.flat`) where there are enough of them.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from tritonnorm.device import Device
from tritonnorm.problem import Problem, minimum_bytes

from . import _moments as moments
from . import _tile as tile
from .base import (
    L2_SHARE,
    BackwardArguments,
    Config,
    EpilogueArguments,
    ForwardArguments,
    Launch,
    advance_counter,
    cdiv,
    mask_in_words,
    predicted_seconds,
)
from .planes import in_rows
from .streaming import (
    COMBINE,
    apply_launch,
    combine_sums_launch,
    gradient_launch,
    over_chunks,
    partial_sums,
)
from .tiling import splits_for, stages, streaming_candidates, streaming_config


@triton.jit(do_not_specialize=["PER_SPLIT", "CHUNKS"])
def moments_kernel(
    x_ptr,  # [N, C, P]
    partial_ptr,  # [4, SPLITS, C] out: count, pivot, sum less it, centred second moment
    N,
    C,
    P,
    xs_n,
    xs_c,
    xs_p,
    PER_SPLIT,  # chunks of a split
    CHUNKS,  # chunks of a channel
    STAGES: tl.constexpr,  # chunks that are on their way or worked on
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Moments of one chunk range of one channel block."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane_n, lane_p, _, _, _, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    count = tl.zeros([], ACC)
    base = tl.zeros([BLOCK_C], ACC)
    total = tl.zeros([BLOCK_C], ACC)
    m2 = tl.zeros([BLOCK_C], ACC)
    first = tl.program_id(1) * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, CHUNKS)
    for run in range(first, last, moments.RUN):
        size, pivot, sums, squares = moments.begin_run(BLOCK_C, BLOCK_N * BLOCK_P, ACC)
        n0, p0 = tile.chunk_origin(run, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0).to(ACC)
        there = tile.valid_columns(lane_n, lane_p, n0, p0, N, P)
        size = tile.chunk_size(n0, p0, N, P, BLOCK_N, BLOCK_P).to(ACC)
        pivot = moments.pivot(x, there, size)
        sums, squares = moments.add_tile(sums, squares, x, pivot[:, None], there)
        for chunk in tl.range(run + 1, tl.minimum(run + moments.RUN, last), num_stages=STAGES):
            n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
            x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0).to(ACC)
            there = tile.valid_columns(lane_n, lane_p, n0, p0, N, P)
            sums, squares = moments.add_tile(sums, squares, x, pivot[:, None], there)
            size += tile.chunk_size(n0, p0, N, P, BLOCK_N, BLOCK_P).to(ACC)
        square = tl.sum(moments.settled(squares, moments.exist(N, C, P)), 1)
        count, base, total, m2 = moments.merge_run(
            count, base, total, m2, size, pivot, tl.sum(sums, 1), square
        )
    plane = tl.num_programs(1).to(tl.int64) * C
    row = partial_ptr + tl.program_id(1).to(tl.int64) * C + c
    tl.store(row, tl.zeros([BLOCK_C], ACC) + count, mask=c < C)
    tl.store(row + plane, base, mask=c < C)
    tl.store(row + 2 * plane, total, mask=c < C)
    tl.store(row + 3 * plane, m2, mask=c < C)


@triton.jit(do_not_specialize=["SPLITS"])
def combine_moments_kernel(
    partial_ptr,  # [4, SPLITS, C, PLANE]: count, pivot, sum less the pivot, centred second
    # moment; or [SPLITS, 3, C] of MERGED ones
    merged_ptr,  # [3, C] out: count, mean, centred second moment; or None
    mean_ptr,  # [C] out, or None: the merged moments alone
    rstd_ptr,  # [C] out, or None
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    counter_ptr,  # [] int64 or None
    eps: tl.float64,
    momentum: tl.float64,
    C,
    SPLITS,
    CUMULATIVE: tl.constexpr,
    MERGED: tl.constexpr,  # what is merged are results of this kernel
    PLANE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the moments of all splits (all means first, then all deviations), finish the
    statistics."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.cast(C, tl.int64) * PLANE
    plane = SPLITS * row
    if MERGED:
        plane, row = row, row * 3
    base = tl.load(partial_ptr + plane + c * PLANE, mask=c < C, other=0.0)
    count = tl.zeros([BLOCK_C], ACC)
    total = tl.zeros([BLOCK_C], ACC)
    m2 = tl.zeros([BLOCK_C], ACC)
    for s0 in range(0, SPLITS * PLANE, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < SPLITS * PLANE)[:, None] & (c < C)[None, :]
        at = partial_ptr + (s // PLANE * row + s % PLANE)[:, None] + c[None, :] * PLANE
        counts = tl.load(at, mask=valid, other=0.0)
        firsts = tl.load(at + plane, mask=valid, other=0.0)
        if MERGED:
            totals = tl.zeros_like(counts)
            squares = tl.load(at + 2 * plane, mask=valid, other=0.0)
        else:
            totals = tl.load(at + 2 * plane, mask=valid, other=0.0)
            squares = tl.load(at + 3 * plane, mask=valid, other=0.0)
        block = moments.rows_moments(counts, firsts, totals, squares, base)
        count, total, m2 = moments.merge_moments(count, total, m2, *block)
    some = tl.maximum(count, 1.0)
    mean = base + total / some
    if merged_ptr is not None:
        tl.store(merged_ptr + c, count, mask=c < C)
        tl.store(merged_ptr + C + c, mean, mask=c < C)
        tl.store(merged_ptr + 2 * tl.cast(C, tl.int64) + c, m2, mask=c < C)
    if mean_ptr is not None:
        rstd = 1.0 / tl.sqrt(m2 / some + tl.full([], eps, ACC))
        moments.store_statistics(
            c, mean, m2, rstd, some, C, mean_ptr, rstd_ptr,
            running_mean_ptr, running_var_ptr, counter_ptr, momentum, CUMULATIVE,
        )  # fmt: skip


def moments_launch(problem: Problem, config: Config) -> Launch:
    """`moments_kernel` over the whole tensor; takes it and its partial moments."""
    return Launch(
        *(moments_kernel, *over_chunks(problem, config), config.num_warps),
        STAGES=stages(config, problem, 1),
        **config.geometry(problem),
    )


def combine_launches(
    problem: Problem, splits: int, merged: bool = False, plane: int = 1
) -> list[Launch]:
    """`combine_moments_kernel`, for running averages that are exponential and cumulative."""
    c = problem.view.c // plane
    return [
        Launch(
            *(combine_moments_kernel, (cdiv(c, COMBINE["BLOCK_C"]),), (c, splits), 4),
            CUMULATIVE=cumulative,
            MERGED=merged,
            PLANE=plane,
            **COMBINE,
        )
        for cumulative in (False, True)
    ]


class Split:
    """Two streaming passes with a small combine between them; three launches each way."""

    name = "split"

    def supports(self, problem: Problem, device: Device) -> str | None:
        return None if problem.batch_statistics else "the statistics are given"

    def heuristic(self, problem: Problem, device: Device) -> Config:
        return streaming_config(in_rows(problem)[0], device)

    def configs(self, problem: Problem, device: Device) -> list[Config]:
        return streaming_candidates(in_rows(problem)[0], device, self.heuristic(problem, device))

    def model_bytes(self, problem: Problem, config: Config) -> int:
        """One pass more over everything that the statistics or the sums depend on."""
        if problem.direction == "forward":
            return minimum_bytes(problem) + problem.bytes
        if not problem.sums:
            return minimum_bytes(problem)
        words = mask_in_words(config, in_rows(problem)[0])
        mask = problem.mask_room if words else problem.mask_bytes
        reads = (2 + problem.reads_residual) * problem.bytes + problem.mask * mask
        if not problem.needs_dx and not problem.needs_dresidual:
            return reads
        second = minimum_bytes(problem)
        if not problem.needs_dx and (problem.activity == "none" or problem.mask):
            second -= problem.bytes  # writing dresidual alone does not read x again
        return reads + second

    def dram_bytes(self, problem: Problem, config: Config, device: Device) -> float:
        """The second pass begins with what the first read last."""
        once = minimum_bytes(problem)
        again = self.model_bytes(problem, config) - once
        return once + max(0.0, again - L2_SHARE * device.l2_bytes)

    def predict(self, problem: Problem, config: Config, device: Device) -> float:
        seen, _ = in_rows(problem)
        programs = config.channel_blocks(seen) * splits_for(config, seen)[0]
        moved = self.dram_bytes(problem, config, device)
        return predicted_seconds(device, moved, programs, launches=3)

    def forward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[ForwardArguments], None]:
        seen, plane = in_rows(problem)
        columns, splits = seen.view.c, splits_for(config, seen)[0]
        moments_of_splits = moments_launch(seen, config)
        combine = combine_launches(seen, splits, plane=plane)
        apply = apply_launch(seen, config, epilogue, given=False, plane=plane)

        def run(a: ForwardArguments) -> None:
            assert a.mean is not None and a.rstd is not None
            partial = a.mean.new_empty((4, splits, columns))
            moments_of_splits(a.x, partial)
            combine[advance_counter(a)](
                *(partial, None, a.mean, a.rstd, a.running_mean, a.running_var, a.counter),
                *(a.eps, 0.0 if a.momentum is None else a.momentum),
            )
            apply(a, a.mean, a.rstd)

        return run

    def backward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[BackwardArguments], None]:
        writes = problem.needs_dx or problem.needs_dresidual
        sums = problem.sums
        seen, plane = in_rows(problem)
        first = gradient_launch(
            *(seen, config, epilogue), sums=True, corrects=False, writes=False, plane=plane
        )
        combine = combine_sums_launch(seen, config, plane)
        corrects = sums and problem.needs_dx
        second = gradient_launch(
            *(seen, config, epilogue), sums=False, corrects=corrects, writes=True, plane=plane
        )

        def run(a: BackwardArguments) -> None:
            whole: torch.Tensor | None = None
            if sums:
                partial = partial_sums(seen, config, a)
                first(a, partial, None, None)
                whole = a.rstd.new_empty((2, problem.view.c)) if problem.needs_dx else None
                combine(a, partial, whole)
            if writes:
                second(a, None, whole, None)

        return run
