"""A channel block stays in the registers of one program: one read, one write, one launch.

Forward moves 2S, backward 3S. The variance is exact: the mean first, then the squared deviations
from it, both over data at hand. No program waits for another.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tritonnorm.device import Device
from tritonnorm.problem import Problem, minimum_bytes

from . import _resident as kernels
from .base import (
    MOST_FILLED,
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
from .planes import (
    WIDEST_ROW,
    blocks_of,
    geometry,
    plane_widths,
    seen_as,
)
from .tiling import power_of_two_blocks

# Warps of a program -> 32-bit registers a thread may spend on the tensors it keeps; the rest is for
# addresses and reductions. The compile audit shows no spill within them on sm_80, sm_90, sm_100 and
# gfx942; with 52 and 4 warps it does on sm_90 (blocks of 32 channels).
PAYLOAD = {4: 48, 8: 64}
# Elements of a chunk, at least one 16-byte access for every thread. Half of it for the derivative
# of a smooth activation: with all of it gelu in bf16 on planes of 7 by 7 spills on sm_90.
TILE = 4096
# Elements of a row of a chunk, at least. Planes of 14 by 14 fill 256 with 64, and with 32 only 224:
# 7/8 again (64x1024x14x14 then fits). On gfx942 that spills (BN+relu forward, 256 samples: 2).
ROWS = (64, 32)
# Bytes of the residual that a thread has on their way at once: with the two programs or more that
# share a multiprocessor, what Little's law asks for (see `persistent`).
AHEAD_BYTES = 128


class Resident:
    """One program holds every value of a channel block."""

    name = "resident"

    def supports(self, problem: Problem, device: Device) -> str | None:
        if not problem.batch_statistics:
            return "the statistics are given"
        if not problem.sums:
            return "nothing is summed, so nothing needs to stay"
        if not self._found(problem, device):
            return "a channel does not fit the registers of one program"
        return None

    def heuristic(self, problem: Problem, device: Device) -> Config:
        found = self._found(problem, device)
        if not found:
            raise ValueError(f"problem: does not fit: {problem}")
        return min(found, key=lambda config: self.predict(problem, config, device))

    def configs(self, problem: Problem, device: Device) -> list[Config]:
        found = [self.heuristic(problem, device), *self._found(problem, device)]
        for max_block_c in (8, 16, 32) if problem.view.channels_last else ():
            config = self._fitting(problem, device, max_block_c)
            found += [config] if config else []
        return list(dict.fromkeys(found))

    def _found(self, problem: Problem, device: Device) -> list[Config]:
        """Configurations with whole planes of several channels, widest access first, and one by
        channel."""
        found = [self._whole_planes(problem, device, width) for width in plane_widths(problem)]
        if not problem.mask or problem.plane == 1:
            found.append(self._fitting(problem, device))
        return [config for config in found if config]

    def model_bytes(self, problem: Problem, config: Config) -> int:
        return minimum_bytes(problem)

    def dram_bytes(self, problem: Problem, config: Config, device: Device) -> float:
        return minimum_bytes(problem)

    def predict(self, problem: Problem, config: Config, device: Device) -> float:
        blocks = blocks_of(problem, config)
        return predicted_seconds(device, minimum_bytes(problem), blocks, launches=1)

    def _whole_planes(self, problem: Problem, device: Device, width: int) -> Config | None:
        """Tiny planes of ``width`` channels (`Problem.flat`), or None if they do not fit.

        With all of the registers, smooth activations spill: BN+gelu and BN+silu on 64 samples of
        2048 planes of 7 by 7, forward, in 16 bits, on sm_90. A mask has room beside: of BN+add+relu
        on 32 samples it takes 8 registers a thread, and none spills on sm_80, sm_90 and sm_100. But
        for forward on 64 samples on sm_100 (2).
        """
        flat = problem.flat
        if (block_c := next_power_of_2(width * problem.plane)) > WIDEST_ROW:
            return None
        share = 0.75 if problem.activity == "smooth" else 1.0
        if problem.mask and problem.direction == "forward" and device.arch.startswith("sm_10"):
            share = MOST_FILLED
        for warps, payload in PAYLOAD.items():
            threads = warps * device.warp
            payload = share * payload * 32 / device.warp  # all spills on gfx942 (BN+silu, 14x14)
            elements = max(TILE, threads * 16 // problem.dtype.itemsize)
            least = threads * 16 // problem.dtype.itemsize // block_c
            most = max(1, elements // block_c)
            block_p = power_of_two_blocks(flat.view.p, most, max(1, least))
            config = Config(block_c, 1, block_p, num_warps=warps)
            of_mask = flat.mask / 8 if flat.direction == "backward" and device.warp == 32 else 0.0
            kept = config.chunks(flat) * config.tile * (registers_kept(flat) - of_mask)
            if kept <= payload * threads:
                return config
        return None

    def _fitting(self, problem: Problem, device: Device, max_block_c: int = 16) -> Config | None:
        """The smallest program that holds a channel block, or None."""
        smooth = problem.activity == "smooth"
        derived = problem.direction == "backward" and smooth
        # Elements of a register each beside a residual: 20 spills (BN+add+gelu, 256x2048x7x7).
        alone = smooth and problem.vector == 1
        share = MOST_FILLED if derived or alone or device.warp > 32 else 1.0
        rows = ROWS if derived and device.warp == 32 else ROWS[:1]
        for narrowest, (warps, payload) in itertools.product(rows, PAYLOAD.items()):
            payload, threads = share * payload, warps * device.warp
            tiling = self._tiling(problem, threads, max_block_c, narrowest)
            config = replace(tiling, num_warps=warps)
            kept = config.chunks(problem) * config.tile * registers_kept(problem)
            if kept <= payload * threads:
                return config
        return None

    def _tiling(self, problem: Problem, threads: int, max_block_c: int, narrowest: int) -> Config:
        """Chunks of about `TILE` elements with little padding.

        Channels last takes 16 channels: 32 bytes of 16-bit data, the sector that DRAM moves.
        """
        view = problem.view
        bits = 8 if problem.mask else 1
        least = threads * 16 // problem.dtype.itemsize
        smooth = problem.direction == "backward" and problem.activity == "smooth"
        limit = max(TILE // 2 if smooth else TILE, least)
        if view.channels_last:
            block_c = max(bits, min(max_block_c, next_power_of_2(view.c)))
            return Config(
                block_c, 1, power_of_two_blocks(view.p, limit // block_c, least // block_c)
            )
        block_p = max(bits, power_of_two_blocks(view.p, limit, narrowest))
        block_n = power_of_two_blocks(view.n, limit // block_p, max(1, least // block_p))
        return Config(1, block_n, block_p)

    def forward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[ForwardArguments], None]:
        chunk = config.tile * problem.dtype.itemsize
        ahead = max(1, AHEAD_BYTES * config.num_warps * 32 // chunk)
        ahead = min(ahead, config.chunks(seen_as(problem, config)))
        launches = [
            self._launch(
                *(kernels.forward_kernel, problem, config),
                CUMULATIVE=cumulative,
                AHEAD=ahead,
                **epilogue.forward(),
            )
            for cumulative in (False, True)
        ]

        def run(a: ForwardArguments) -> None:
            launches[advance_counter(a)](
                *(a.x, a.y, a.residual, a.mask, a.mean, a.rstd, a.weight, a.bias),
                *(a.slope, a.running_mean, a.running_var, a.counter),
                *(a.eps, 0.0 if a.momentum is None else a.momentum),
            )

        return run

    def backward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[BackwardArguments], None]:
        launch = self._launch(kernels.backward_kernel, problem, config, **epilogue.backward())

        def run(a: BackwardArguments) -> None:
            launch(
                *(a.dy, a.x, a.residual, a.mask, a.dx, a.dresidual, a.mean, a.rstd),
                *(a.weight, a.bias, a.slope, a.dweight, a.dbias, a.dslope),
            )

        return run

    def _launch(self, kernel: Any, problem: Problem, config: Config, **meta: Any) -> Launch:
        grid, meta = (blocks_of(problem, config),), meta | geometry(problem, config)
        problem = seen_as(problem, config)
        view = problem.view
        return Launch(
            kernel,
            grid,
            (view.n, view.c, view.p, *x_strides(problem)),
            config.num_warps,
            **meta,
            CHUNKS=config.chunks(problem),
        )
