"""Passes over the data by many programs a channel: normalize, differentiate, sum.

`split` runs them after its statistics, `affine` with given ones. `docs/kernels.md` derives the
formulas.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import triton
import triton.language as tl

from tritonnorm.device import Device
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
    tile_shape,
    x_strides,
)

# Elements of a tile, with 4 warps: 32 a thread, four 16-byte loads of bf16 in flight per tensor.
# In float64 a quarter, the same bytes: with 4096 the compile audit finds spills on sm_80 (14) and
# on sm_100 (4), with 2048 still 4 on sm_100.
TILE = 4096
TILE_FLOAT64 = 1024
# A smooth activation needs more registers, its derivative most: with 4096 triton 3.6 spills a few
# (mish in fp32 on sm_100 both ways, the backward of gelu in fp16 on sm_80).
TILE_SMOOTH = 2048
# Programs per multiprocessor a launch should have. The compile audit finds 48 to 128 registers a
# thread, so 4 to 10 programs of 4 warps are resident at once; more splits would only lengthen the
# combine.
PROGRAMS_PER_SM = 8
# The combine kernels: [splits, channels] tiles. Few channels each, so that many programs share the
# work.
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
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    FROM_VARIANCE: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Normalize, scale, shift, add, activate: one chunk range of one channel block."""
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c0 = tl.program_id(0) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(ACC)
    rstd = tl.load(rstd_ptr + c, mask=c < C, other=1.0).to(ACC)
    if FROM_VARIANCE:
        rstd = 1.0 / tl.sqrt(rstd + tl.full([], eps, ACC))
    if save_mean_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(save_mean_ptr + c, mean, mask=c < C)
            tl.store(save_rstd_ptr + c, rstd, mask=c < C)
    scale, shift = epilogue.affine_parameters(c, C, rstd, weight_ptr, bias_ptr)
    first = tl.program_id(1) * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, CHUNKS)
    for i in range(first, last):
        # In reverse: what a first pass read last is still in the L2 cache.
        chunk = first + last - 1 - i
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        base = n0 * s_n + p0 * s_p
        x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0).to(ACC)
        body.store_output(
            x, mean, scale, shift, y_ptr, residual_ptr, mask_ptr,
            base, lane, valid, c0, n0, p0, N, C, P,
            ACT, GATE, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST,
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
    partial_ptr,  # [2, SPLITS, C] sums of g and of g * (x - mean), out, or None
    sums_ptr,  # [2, C] the same over the whole channel, in, or None: given statistics
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
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    READS_X: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Gradients, sums of gradients, or both, over one chunk range of one channel block."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c0 = tl.program_id(0) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + c, mask=c < C, other=0.0)
    scale, shift = epilogue.affine_parameters(c, C, rstd, weight_ptr, bias_ptr)
    if sums_ptr is not None:
        total = tl.cast(N, ACC) * tl.cast(P, ACC)
        mean_g = tl.load(sums_ptr + c, mask=c < C, other=0.0) / total
        slope = tl.load(sums_ptr + C + c, mask=c < C, other=0.0) / total * rstd * rstd
    sum_g = tl.zeros([BLOCK_C], ACC)
    sum_gx = tl.zeros([BLOCK_C], ACC)
    first = tl.program_id(1) * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, CHUNKS)
    for i in range(first, last):
        chunk = i
        if sums_ptr is not None:
            chunk = first + last - 1 - i
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        base = n0 * s_n + p0 * s_p
        x = None
        if READS_X:
            x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0).to(ACC)
        g = body.load_gradient(
            x, mean, scale, shift, dy_ptr, residual_ptr, mask_ptr, dresidual_ptr,
            base, lane, valid, c0, n0, p0, N, C, P,
            GRADIENT, GATE, GATED, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST,
        )  # fmt: skip
        if dx_ptr is not None:
            if sums_ptr is not None:
                dx = body.input_gradient(g, x, mean, mean_g, slope, scale)
            else:
                dx = g * scale[:, None]
            tl.store(dx_ptr + base + lane, dx.to(dx_ptr.dtype.element_ty), mask=valid)
        if partial_ptr is not None:
            g = tl.where(valid, g, 0.0)
            sum_g += tl.sum(g, 1)
            sum_gx += tl.sum(g * (x - mean[:, None]), 1)
    if partial_ptr is not None:
        row = partial_ptr + tl.program_id(1).to(tl.int64) * C + c
        tl.store(row, sum_g, mask=c < C)
        tl.store(row + tl.num_programs(1).to(tl.int64) * C, sum_gx, mask=c < C)


@triton.jit(do_not_specialize=["SPLITS"])
def combine_sums_kernel(
    partial_ptr,  # [2, SPLITS, C]
    rstd_ptr,  # [C]
    sums_ptr,  # [2, C] out, or None
    dweight_ptr,  # [C] out, or None
    dbias_ptr,  # [C] out, or None
    C,
    SPLITS,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the partial sums of each channel in a fixed order and write its parameter gradients."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_g = tl.zeros([BLOCK_C], ACC)
    sum_gx = tl.zeros([BLOCK_C], ACC)
    for s0 in range(0, SPLITS, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < SPLITS)[:, None] & (c < C)[None, :]
        at = partial_ptr + s.to(tl.int64)[:, None] * C + c[None, :]
        sum_g += tl.sum(tl.load(at, mask=valid, other=0.0), 0)
        sum_gx += tl.sum(tl.load(at + tl.cast(SPLITS, tl.int64) * C, mask=valid, other=0.0), 0)
    if sums_ptr is not None:
        tl.store(sums_ptr + c, sum_g, mask=c < C)
        tl.store(sums_ptr + C + c, sum_gx, mask=c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_g.to(dbias_ptr.dtype.element_ty), mask=c < C)
    if dweight_ptr is not None:
        rstd = tl.load(rstd_ptr + c, mask=c < C, other=0.0)
        tl.store(dweight_ptr + c, (sum_gx * rstd).to(dweight_ptr.dtype.element_ty), mask=c < C)


def splits_for(config: Config, problem: Problem) -> tuple[int, int, int]:
    """``(splits, chunks per split, chunks)``: the configuration's splits, less those that would be
    empty."""
    chunks = config.chunks(problem)
    per_split = cdiv(chunks, min(config.splits, chunks))
    return cdiv(chunks, per_split), per_split, chunks


def tile_elements(problem: Problem) -> int:
    """Elements of the tile that the formula takes."""
    if problem.accumulator == torch.float64:
        return TILE_FLOAT64
    many = problem.direction == "backward" or problem.dtype.itemsize > 2
    return TILE_SMOOTH if many and problem.activity == "smooth" else TILE


def streaming_config(problem: Problem, device: Device) -> Config:
    """Tiles of `TILE` elements, and enough splits of each channel block to fill the device."""
    block_c, block_n, block_p = tile_shape(problem, tile_elements(problem), max_block_c=64)
    config = Config(block_c, block_n, block_p)
    blocks = config.channel_blocks(problem)
    splits = cdiv(device.sms * PROGRAMS_PER_SM, blocks)
    splits = max(1, min(splits, config.chunks(problem)))
    return Config(block_c, block_n, block_p, splits)


def apply_launch(
    problem: Problem, config: Config, epilogue: EpilogueArguments, *, given: bool
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
    )

    def run(a: ForwardArguments, mean: torch.Tensor, rstd: torch.Tensor) -> None:
        saved = (a.mean, a.rstd) if given else (None, None)
        launch(a.x, a.y, a.residual, a.mask, mean, rstd, a.weight, a.bias, *saved, a.eps)

    return run


def gradient_launch(
    problem: Problem,
    config: Config,
    epilogue: EpilogueArguments,
    *,
    sums: bool,
    corrects: bool,
    writes: bool,
) -> Callable[[BackwardArguments, torch.Tensor | None, torch.Tensor | None], None]:
    """`gradient_kernel` over the whole tensor.

    What comes back takes partial sums to write, if it ``sums``, and the whole sums that dx is
    corrected with, if it ``corrects``. It ``writes`` the gradients or only sums.
    """
    recomputes = problem.activity != "none" and not problem.mask
    launch = Launch(
        gradient_kernel,
        *over_chunks(problem, config),
        config.num_warps,
        **epilogue.backward(),
        READS_X=sums or (corrects and writes and problem.needs_dx) or recomputes,
        **config.geometry(problem),
    )

    def run(a: BackwardArguments, partial: torch.Tensor | None, whole: torch.Tensor | None) -> None:
        outputs = (a.dx, a.dresidual) if writes else (None, None)
        launch(
            *(a.dy, a.x, a.residual, a.mask, *outputs, a.mean, a.rstd, a.weight, a.bias),
            *(partial, whole),
        )

    return run


def combine_sums_launch(
    problem: Problem, config: Config
) -> Callable[[BackwardArguments, torch.Tensor, torch.Tensor | None], None]:
    """`combine_sums_kernel` over partial sums ``[2, SPLITS, C]``."""
    c = problem.view.c
    splits = splits_for(config, problem)[0]
    launch = Launch(combine_sums_kernel, (cdiv(c, COMBINE["BLOCK_C"]),), (c, splits), 4, **COMBINE)

    def run(a: BackwardArguments, partial: torch.Tensor, whole: torch.Tensor | None) -> None:
        launch(partial, a.rstd, whole, a.dweight, a.dbias)

    return run


def over_chunks(problem: Problem, config: Config) -> tuple[tuple[int, int], tuple[int | None, ...]]:
    """Grid and sizes of a kernel whose programs are channel blocks by splits."""
    splits, per_split, chunks = splits_for(config, problem)
    view = problem.view
    sizes = (view.n, view.c, view.p, *x_strides(problem), per_split, chunks)
    return (config.channel_blocks(problem), splits), sizes


def partial_sums(problem: Problem, config: Config, like: torch.Tensor) -> torch.Tensor:
    """Workspace ``[2, SPLITS, C]`` for `gradient_kernel`."""
    return like.new_empty((2, splits_for(config, problem)[0], problem.view.c))


def streaming_candidates(problem: Problem, device: Device, first: Config) -> list[Config]:
    """Neighbours of a configuration: tiles of half and twice the size, fewer and more splits."""
    found = [first]
    usual = tile_elements(problem)
    for elements in (usual // 2, usual, usual * 2):
        for max_block_c in (64, 128) if problem.view.channels_last else (1,):
            for programs_per_sm in (PROGRAMS_PER_SM // 4, PROGRAMS_PER_SM):
                block_c, block_n, block_p = tile_shape(problem, elements, max_block_c)
                config = Config(block_c, block_n, block_p, num_warps=8 if elements > usual else 4)
                wanted = cdiv(device.sms * programs_per_sm, config.channel_blocks(problem))
                splits = max(1, min(wanted, config.chunks(problem)))
                found.append(replace(config, splits=splits))
    return list(dict.fromkeys(found))
