"""Passes over the data by many programs a channel: normalize, differentiate, sum.

`split` runs them after its statistics, `affine` with given ones. `docs/kernels.md` derives the
formulas.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from tritonnorm.problem import Problem

from . import _body as body
from . import _epilogue as epilogue
from . import _tile as tile
from .base import (
    BackwardArguments,
    Config,
    EpilogueArguments,
    ForwardArguments,
    Launch,
    cdiv,
    mask_in_words,
    x_strides,
)
from .tiling import splits_for, stages

# The combine kernels: [splits, channels] tiles, of few channels, so that many programs share them.
COMBINE = {"BLOCK_C": 8, "BLOCK_S": 128}


@triton.jit(do_not_specialize=["PER_SPLIT", "CHUNKS"])
def apply_kernel(
    x_ptr,  # [N, C, P] input
    y_ptr,  # [N, C, P] output, dense
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    mean_ptr,  # [C]
    rstd_ptr,  # [C] 1 / sqrt(var + eps), or the variance itself if FROM_VARIANCE
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    slope_ptr,  # [C] or [1] learned slope of a prelu, or None
    save_mean_ptr,  # [C] out, or None: the statistics as the backward wants them
    save_rstd_ptr,  # [C] out, or None
    eps: tl.float64,
    N,
    C,
    P,
    xs_n,
    xs_c,
    xs_p,
    PER_SPLIT,  # chunks of a split
    CHUNKS,  # chunks of a channel
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation; of a learned slope `load_leak`'s STEP
    B: tl.constexpr,
    FROM_VARIANCE: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PLANE: tl.constexpr,  # columns of a channel, where C counts columns (`Problem.flat`)
):
    """Normalize, scale, shift, add, activate: one chunk range of one channel block."""
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c0 = tl.program_id(0) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    at, channels = c // PLANE, C // PLANE
    mean = tl.load(mean_ptr + at, mask=c < C, other=0.0).to(ACC)
    rstd = tl.load(rstd_ptr + at, mask=c < C, other=1.0).to(ACC)
    if FROM_VARIANCE:
        rstd = 1.0 / tl.sqrt(rstd + tl.full([], eps, ACC))
    if save_mean_ptr is not None:
        if tl.program_id(1) == 0:
            one_each = (c < C) & (c % PLANE == 0)
            tl.store(save_mean_ptr + at, mean, mask=one_each)
            tl.store(save_rstd_ptr + at, rstd, mask=one_each)
    scale, shift = epilogue.affine_parameters(at, channels, rstd, weight_ptr, bias_ptr)
    leak = None
    if slope_ptr is not None:
        leak = epilogue.load_leak(slope_ptr, at, channels, A, ACC)
    first = tl.program_id(1) * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, CHUNKS)
    for i in range(first, last):
        # In reverse: what a first pass read last is still in the L2 cache.
        chunk = first + last - 1 - i
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        base = n0 * s_n + p0 * s_p
        x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0).to(ACC)
        residual = body.load_residual(residual_ptr, x, base, lane, valid, "")
        body.store_output(
            x, residual, mean, scale, shift, leak, y_ptr, residual_ptr, mask_ptr,
            base, lane, valid, c0, n0, p0, N, C, P,
            ACT, GATE, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, "",
        )  # fmt: skip


@triton.jit(do_not_specialize=["PER_SPLIT", "CHUNKS"])
def gradient_kernel(
    dy_ptr,  # [N, C, P] dense
    x_ptr,  # [N, C, P]
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    dx_ptr,  # [N, C, P] dense, or None
    dresidual_ptr,  # [N, C, P] dense, or None
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    slope_ptr,  # [C] or [1] learned slope of a prelu, or None
    partial_ptr,  # [2, SPLITS, C] sums of g and of g * (x - mean), out, or None; [3, SPLITS, C]
    # with those of a slope
    sums_ptr,  # [2, C] the same over the whole channel, in, or None: given statistics
    count_ptr,  # [C] values that those are sums of, or None: the N * P at hand
    N,
    C,
    P,
    xs_n,
    xs_c,
    xs_p,
    PER_SPLIT,
    CHUNKS,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation; of a learned slope `load_leak`'s STEP
    B: tl.constexpr,
    READS_X: tl.constexpr,
    WORDS: tl.constexpr,  # the bits of the mask come in words
    STAGES: tl.constexpr,  # chunks that are on their way or worked on
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PLANE: tl.constexpr,  # columns of a channel, where C counts columns (`Problem.flat`)
):
    """Gradients, sums of gradients, or both, over one chunk range of one channel block."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c0 = tl.program_id(0) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    at, channels = c // PLANE, C // PLANE
    mean = tl.load(mean_ptr + at, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + at, mask=c < C, other=0.0)
    scale, shift = epilogue.affine_parameters(at, channels, rstd, weight_ptr, bias_ptr)
    leak = None
    if slope_ptr is not None:
        leak = epilogue.load_leak(slope_ptr, at, channels, A, ACC)
    if sums_ptr is not None:
        if count_ptr is None:
            total = tl.cast(N, ACC) * tl.cast(P, ACC) * PLANE
        else:
            total = tl.load(count_ptr + at, mask=c < C, other=1.0)
        mean_g = tl.load(sums_ptr + at, mask=c < C, other=0.0) / total
        slope = tl.load(sums_ptr + channels + at, mask=c < C, other=0.0) / total * rstd * rstd
    sums_g = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    sums_gx = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    sums_leak = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_P], ACC)
    first = tl.program_id(1) * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, CHUNKS)
    for i in tl.range(first, last, num_stages=STAGES):
        chunk = i
        if sums_ptr is not None:
            chunk = first + last - 1 - i
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        base = n0 * s_n + p0 * s_p
        x = None
        if READS_X:
            x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0).to(ACC)
        dy, more = body.load_gradients(
            dy_ptr, residual_ptr, mask_ptr, base, lane, valid, c0, n0, p0, N, C, P,
            BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, "", WORDS,
        )  # fmt: skip
        g, of_leak = body.gradient(
            x, dy, more, mean, scale, shift, leak, valid, residual_ptr, mask_ptr,
            GRADIENT, GATE, GATED, A, B, CHANNELS_LAST,
        )  # fmt: skip
        if dresidual_ptr is not None:
            dresidual = g.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + base + lane, dresidual, mask=valid)
        if dx_ptr is not None:
            if sums_ptr is not None:
                dx = body.input_gradient(g, x, mean, mean_g, slope, scale)
            else:
                dx = g * scale[:, None]
            tl.store(dx_ptr + base + lane, dx.to(dx_ptr.dtype.element_ty), mask=valid)
        if partial_ptr is not None:
            sums_g += g
            sums_gx += g * (x - mean[:, None])
            if leak is not None:
                sums_leak += of_leak
    if partial_ptr is not None:
        row = partial_ptr + tl.program_id(1).to(tl.int64) * C + c
        tl.store(row, tl.sum(sums_g, 1), mask=c < C)
        plane = tl.num_programs(1).to(tl.int64) * C
        tl.store(row + plane, tl.sum(sums_gx, 1), mask=c < C)
        if leak is not None:
            tl.store(row + 2 * plane, tl.sum(sums_leak, 1), mask=c < C)


@triton.jit(do_not_specialize=["SPLITS"])
def combine_sums_kernel(
    partial_ptr,  # [2, SPLITS, C, PLANE]; [3, ...] with a learned slope
    rstd_ptr,  # [C]
    sums_ptr,  # [2, C] out, or None
    dweight_ptr,  # [C] out, or None
    dbias_ptr,  # [C] out, or None
    dslope_ptr,  # [C] out, or None
    C,
    SPLITS,
    PLANE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the partial sums of each channel in a fixed order and write its parameter gradients."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_g = tl.zeros([BLOCK_C], ACC)
    sum_gx = tl.zeros([BLOCK_C], ACC)
    sum_leak = tl.zeros([BLOCK_C], ACC)
    row = tl.cast(C, tl.int64) * PLANE
    for s0 in range(0, SPLITS * PLANE, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < SPLITS * PLANE)[:, None] & (c < C)[None, :]
        at = partial_ptr + (s // PLANE * row + s % PLANE)[:, None] + c[None, :] * PLANE
        sum_g += tl.sum(tl.load(at, mask=valid, other=0.0), 0)
        sum_gx += tl.sum(tl.load(at + SPLITS * row, mask=valid, other=0.0), 0)
        if dslope_ptr is not None:
            sum_leak += tl.sum(tl.load(at + 2 * SPLITS * row, mask=valid, other=0.0), 0)
    if sums_ptr is not None:
        tl.store(sums_ptr + c, sum_g, mask=c < C)
        tl.store(sums_ptr + C + c, sum_gx, mask=c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_g.to(dbias_ptr.dtype.element_ty), mask=c < C)
    if dweight_ptr is not None:
        rstd = tl.load(rstd_ptr + c, mask=c < C, other=0.0)
        tl.store(dweight_ptr + c, (sum_gx * rstd).to(dweight_ptr.dtype.element_ty), mask=c < C)
    if dslope_ptr is not None:
        tl.store(dslope_ptr + c, sum_leak.to(dslope_ptr.dtype.element_ty), mask=c < C)


def apply_launch(
    problem: Problem, config: Config, epilogue: EpilogueArguments, *, given: bool, plane: int = 1
) -> Callable[[ForwardArguments, torch.Tensor, torch.Tensor], None]:
    """`apply_kernel` over the whole tensor.

    What comes back takes the mean and the inverse standard deviation, or if they are ``given`` the
    variance.
    """
    launch = Launch(
        apply_kernel,
        *over_chunks(problem, config),
        config.num_warps,
        **epilogue.forward(),
        FROM_VARIANCE=given,
        ACC=tl.float64 if problem.accumulator == torch.float64 else tl.float32,
        **config.geometry(problem),
        PLANE=plane,
    )

    def run(a: ForwardArguments, mean: torch.Tensor, rstd: torch.Tensor) -> None:
        saved = (a.mean, a.rstd) if given else (None, None)
        vectors = (a.weight, a.bias, a.slope, *saved)
        launch(a.x, a.y, a.residual, a.mask, mean, rstd, *vectors, a.eps)

    return run


def gradient_launch(
    problem: Problem,
    config: Config,
    epilogue: EpilogueArguments,
    *,
    sums: bool,
    corrects: bool,
    writes: bool,
    plane: int = 1,
) -> Callable[..., None]:
    """`gradient_kernel` over the whole tensor.

    What comes back takes partial sums to write, if it ``sums``, the whole sums that dx is corrected
    with, if it ``corrects``, and the count behind them. It ``writes`` the gradients or only sums.
    """
    recomputes = problem.activity != "none" and not problem.mask
    launch = Launch(
        gradient_kernel,
        *over_chunks(problem, config),
        config.num_warps,
        # ptxas would rather spill two registers than give a program of 8 warps all it needs.
        keeps=not writes and config.num_warps > 4,
        **epilogue.backward(),
        WORDS=not writes and mask_in_words(config, problem),
        STAGES=1 if writes else stages(config, problem, 2 + problem.reads_residual),
        READS_X=sums or (corrects and writes and problem.needs_dx) or recomputes,
        **config.geometry(problem),
        PLANE=plane,
    )

    def run(a: BackwardArguments, *vectors: torch.Tensor | None) -> None:
        outputs = (a.dx, a.dresidual) if writes else (None, None)
        given = (a.mean, a.rstd, a.weight, a.bias, a.slope)
        launch(a.dy, a.x, a.residual, a.mask, *outputs, *given, *vectors)

    return run


def combine_sums_launch(
    problem: Problem, config: Config, plane: int = 1
) -> Callable[[BackwardArguments, torch.Tensor, torch.Tensor | None], None]:
    """`combine_sums_kernel` over partial sums ``[2, SPLITS, C, plane]``."""
    c, splits = problem.view.c // plane, splits_for(config, problem)[0]
    grid = (cdiv(c, COMBINE["BLOCK_C"]),)
    launch = Launch(combine_sums_kernel, grid, (c, splits), 4, PLANE=plane, **COMBINE)

    def run(a: BackwardArguments, partial: torch.Tensor, whole: torch.Tensor | None) -> None:
        launch(partial, a.rstd, whole, a.dweight, a.dbias, a.dslope)

    return run


def over_chunks(problem: Problem, config: Config) -> tuple[tuple[int, int], tuple[int | None, ...]]:
    """Grid and sizes of a kernel whose programs are channel blocks by splits."""
    splits, per_split, chunks = splits_for(config, problem)
    view = problem.view
    sizes = (view.n, view.c, view.p, *x_strides(problem), per_split, chunks)
    return (config.channel_blocks(problem), splits), sizes


def partial_sums(problem: Problem, config: Config, a: BackwardArguments) -> torch.Tensor:
    """Workspace ``[2, SPLITS, C]`` for `gradient_kernel`; ``[3, SPLITS, C]`` with a slope."""
    sums = 2 if a.slope is None else 3
    return a.rstd.new_empty((sums, splits_for(config, problem)[0], problem.view.c))
