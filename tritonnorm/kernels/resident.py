"""A channel block stays in the registers of one program: one read, one write, one launch.

Forward moves 2S, backward 3S. The variance is exact: the mean first, then the squared deviations
from it, both over data at hand. No program waits for another.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from tritonnorm.device import Device
from tritonnorm.problem import Problem, minimum_bytes

from . import _body as body
from . import _epilogue as epilogue
from . import _moments as moments
from . import _tile as tile
from .base import (
    BackwardArguments,
    Config,
    EpilogueArguments,
    ForwardArguments,
    Launch,
    advance_counter,
    next_power_of_2,
    predicted_seconds,
    registers_kept,
    x_strides,
)
from .tiling import power_of_two_blocks

# Warps of a program -> 32-bit registers a thread may spend on the tensors it keeps; the rest is for
# addresses and reductions. The compile audit shows no spill within them on sm_80, sm_90, sm_100 and
# gfx942; with 52 and 4 warps it does on sm_90 (blocks of 32 channels).
PAYLOAD = {4: 48, 8: 64}
TILE = 4096  # elements of a chunk, at least one 16-byte access for every thread


@triton.jit
def forward_kernel(
    x_ptr,  # [N, C, P] input
    y_ptr,  # [N, C, P] output, dense
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    mean_ptr,  # [C] out
    rstd_ptr,  # [C] out
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    counter_ptr,  # [] int64 or None
    eps: tl.float64,
    momentum: tl.float64,
    N,
    C,
    P,
    xs_n,
    xs_c,
    xs_p,
    CUMULATIVE: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    CHUNKS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Statistics, running statistics, normalize, add, activate, for one channel block."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    c0 = tl.program_id(0) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    xs = ()
    for chunk in tl.static_range(CHUNKS):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        xs = xs + (tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0),)
    count = tl.cast(N, ACC) * tl.cast(P, ACC)
    pivot = moments.pivot(xs[0].to(ACC))
    total = tl.zeros([BLOCK_C], ACC)
    for chunk in tl.static_range(CHUNKS):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        total += tl.sum(tl.where(valid, xs[chunk].to(ACC) - pivot[:, None], 0.0), 1)
    mean = pivot + total / count
    m2 = tl.zeros([BLOCK_C], ACC)
    for chunk in tl.static_range(CHUNKS):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        centred = tl.where(valid, xs[chunk].to(ACC) - mean[:, None], 0.0)
        m2 += tl.sum(centred * centred, 1)
    rstd = 1.0 / tl.sqrt(m2 / count + tl.full([], eps, ACC))
    moments.store_statistics(
        c, mean, m2, rstd, count, C, mean_ptr, rstd_ptr,
        running_mean_ptr, running_var_ptr, counter_ptr, momentum, CUMULATIVE,
    )  # fmt: skip
    scale, shift = epilogue.affine_parameters(c, C, rstd, weight_ptr, bias_ptr)
    for chunk in tl.static_range(CHUNKS):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        base = n0 * s_n + p0 * s_p
        body.store_output(
            xs[chunk].to(ACC), mean, scale, shift, y_ptr, residual_ptr, mask_ptr,
            base, lane, valid, c0, n0, p0, N, C, P,
            ACT, GATE, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST,
        )  # fmt: skip


@triton.jit
def backward_kernel(
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
    dweight_ptr,  # [C] out, or None
    dbias_ptr,  # [C] out, or None
    N,
    C,
    P,
    xs_n,
    xs_c,
    xs_p,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    CHUNKS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """All gradients of one channel block; x stays in registers, and dy (or g, where it depends on
    more than x and dy)."""
    KEEP_DY: tl.constexpr = residual_ptr is None and mask_ptr is None and dresidual_ptr is None
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
    xs = ()
    gs = ()
    sum_g = tl.zeros([BLOCK_C], ACC)
    sum_gx = tl.zeros([BLOCK_C], ACC)
    for chunk in tl.static_range(CHUNKS):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P)
        valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
        base = n0 * s_n + p0 * s_p
        raw = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0)
        x = raw.to(ACC)
        if KEEP_DY:
            dy = tl.load(dy_ptr + base + lane, mask=valid, other=0.0)
            g = body.gradient(x, dy.to(ACC), mean, scale, shift, GRADIENT, GATE, GATED, A, B)
            gs = gs + (dy,)
        else:
            g = body.load_gradient(
                x, mean, scale, shift, dy_ptr, residual_ptr, mask_ptr, dresidual_ptr,
                base, lane, valid, c0, n0, p0, N, C, P,
                GRADIENT, GATE, GATED, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST,
            )  # fmt: skip
            gs = gs + (g,)
        g = tl.where(valid, g, 0.0)
        sum_g += tl.sum(g, 1)
        sum_gx += tl.sum(g * (x - mean[:, None]), 1)
        xs = xs + (raw,)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_g.to(dbias_ptr.dtype.element_ty), mask=c < C)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, (sum_gx * rstd).to(dweight_ptr.dtype.element_ty), mask=c < C)
    if dx_ptr is not None:
        count = tl.cast(N, ACC) * tl.cast(P, ACC)
        mean_g = sum_g / count
        slope = sum_gx / count * rstd * rstd
        for chunk in tl.static_range(CHUNKS):
            n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P)
            valid = tile.valid_lanes(c, C, lane_n, lane_p, n0, p0, N, P)
            base = n0 * s_n + p0 * s_p
            x = xs[chunk].to(ACC)
            g = gs[chunk].to(ACC)
            if KEEP_DY:
                g = body.gradient(x, g, mean, scale, shift, GRADIENT, GATE, GATED, A, B)
            dx = body.input_gradient(g, x, mean, mean_g, slope, scale)
            tl.store(dx_ptr + base + lane, dx.to(dx_ptr.dtype.element_ty), mask=valid)


class Resident:
    """One program holds every value of a channel block."""

    name = "resident"

    def supports(self, problem: Problem, device: Device) -> str | None:
        if not problem.batch_statistics:
            return "the statistics are given"
        if not problem.sums:
            return "nothing is summed, so nothing needs to stay"
        if self._fitting(problem, device) is None:
            return "a channel does not fit the registers of one program"
        return None

    def heuristic(self, problem: Problem, device: Device) -> Config:
        config = self._fitting(problem, device)
        if config is None:
            raise ValueError(f"problem: does not fit: {problem}")
        return config

    def configs(self, problem: Problem, device: Device) -> list[Config]:
        found = [self.heuristic(problem, device)]
        for max_block_c in (8, 16, 32) if problem.view.channels_last else ():
            config = self._fitting(problem, device, max_block_c)
            found += [config] if config else []
        return list(dict.fromkeys(found))

    def model_bytes(self, problem: Problem, config: Config) -> int:
        return minimum_bytes(problem)

    def dram_bytes(self, problem: Problem, config: Config, device: Device) -> float:
        return minimum_bytes(problem)

    def predict(self, problem: Problem, config: Config, device: Device) -> float:
        return predicted_seconds(
            device, minimum_bytes(problem), config.channel_blocks(problem), launches=1
        )

    def _fitting(self, problem: Problem, device: Device, max_block_c: int = 16) -> Config | None:
        """The smallest program that holds a channel block, or None."""
        for warps, payload in PAYLOAD.items():
            threads = warps * device.warp
            config = replace(self._tiling(problem, threads, max_block_c), num_warps=warps)
            kept = config.chunks(problem) * config.tile * registers_kept(problem)
            if kept <= payload * threads:
                return config
        return None

    def _tiling(self, problem: Problem, threads: int, max_block_c: int) -> Config:
        """Chunks of about `TILE` elements with little padding.

        Channels last takes 16 channels: 32 bytes of 16-bit data, the sector that DRAM moves.
        """
        view = problem.view
        bits = 8 if problem.mask else 1
        least = threads * 16 // problem.dtype.itemsize
        limit = max(TILE, least)
        if view.channels_last:
            block_c = max(bits, min(max_block_c, next_power_of_2(view.c)))
            return Config(
                block_c, 1, power_of_two_blocks(view.p, limit // block_c, least // block_c)
            )
        block_p = max(bits, power_of_two_blocks(view.p, limit, 64))
        block_n = power_of_two_blocks(view.n, limit // block_p, max(1, least // block_p))
        return Config(1, block_n, block_p)

    def forward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[ForwardArguments], None]:
        launches = [
            self._launch(
                forward_kernel, problem, config, CUMULATIVE=cumulative, **epilogue.forward()
            )
            for cumulative in (False, True)
        ]

        def run(a: ForwardArguments) -> None:
            launches[advance_counter(a)](
                *(a.x, a.y, a.residual, a.mask, a.mean, a.rstd, a.weight, a.bias),
                *(a.running_mean, a.running_var, a.counter),
                *(a.eps, 0.0 if a.momentum is None else a.momentum),
            )

        return run

    def backward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[BackwardArguments], None]:
        launch = self._launch(backward_kernel, problem, config, **epilogue.backward())

        def run(a: BackwardArguments) -> None:
            launch(
                *(a.dy, a.x, a.residual, a.mask, a.dx, a.dresidual, a.mean, a.rstd),
                *(a.weight, a.bias, a.dweight, a.dbias),
            )

        return run

    def _launch(self, kernel: Any, problem: Problem, config: Config, **meta: Any) -> Launch:
        view = problem.view
        return Launch(
            kernel,
            (config.channel_blocks(problem),),
            (view.n, view.c, view.p, *x_strides(problem)),
            config.num_warps,
            **meta,
            CHUNKS=config.chunks(problem),
            **config.geometry(problem),
        )
