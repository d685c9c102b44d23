"""Programs that share a channel block meet: one launch, and what is read twice is near.

The programs of a channel block keep what they can of it in registers, and leave the rest to the L2
cache. After the first pass they exchange moments (or sums) and meet; the second pass takes the
registers first, then the rest in reverse. Channel blocks that do not fit together go one group
after the other, and each set of programs goes on to its next block without waiting for the other
sets. Forward moves 2S and backward 3S as far as a group fits in registers and L2; where it does
not, what is accessed once is marked to leave the cache first.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tritonnorm.device import Device
from tritonnorm.problem import Problem, minimum_bytes

from . import _persistent as kernels
from .base import (
    L2_SHARE,
    BackwardArguments,
    Config,
    EpilogueArguments,
    ForwardArguments,
    Launch,
    advance_counter,
    cdiv,
    predicted_seconds,
    registers_kept,
    x_strides,
)
from .tiling import power_of_two_blocks

# Warps of a program -> programs on a multiprocessor. At up to 255 registers a thread (256 on CDNA,
# where a wavefront has 64 lanes) 8 warps fill its register file, so these are always co-resident.
# Where there is more than one, others work while one waits.
WARPS = {8: 1, 4: 2}
# 32-bit registers a thread may spend on what it keeps, by the start of the architecture: the rest
# is for addresses, reductions and loads on their way. The compile audit finds no spill with them,
# and does with 36 on sm_80 (BN+add+relu, bf16 NHWC), with 40 on sm_100 (the backward of BN+silu),
# with 48 on gfx942, where a program has twice the threads.
PAYLOAD = {"sm_8": 28, "sm_": 36, "gfx": 24}
TILE = 512  # elements of a chunk for each warp: two 16-byte accesses of 16-bit data a thread
# Bytes of x in a batch for each element of a chunk: with 16-bit data four chunks are loaded before
# the first is used. By Little's law a multiprocessor of an H200 needs 4.8 TB/s / 132 times about
# 0.8 microseconds = 29 KB on their way; four chunks of 8 warps are 32 KB.
BATCH_BYTES = 8
# Values of each quantity that a program reads at a meeting, for each warp: 16 registers a thread.
# With 64 channels and 126 splits (64 registers) the compile audit finds 126 spills.
MEETING_VALUES = 512
# How long a meeting takes: two trips to the L2 cache and the wait for the slowest. An estimate, to
# be measured.
MEETING_SECONDS = 2e-6
MOST_BLOCKS = 1024  # channel blocks at once: semaphores of a stream


class Persistent:
    """A cooperative launch whose programs meet once per group of channel blocks."""

    name = "persistent"

    def supports(self, problem: Problem, device: Device) -> str | None:
        if not problem.batch_statistics:
            return "the statistics are given"
        if not problem.sums or (problem.direction == "backward" and not problem.needs_dx):
            return "there is no second pass over the data"
        if not device.arch.startswith(tuple(PAYLOAD)):
            return "programs that meet cannot run one after another"
        if device.sms < 2 or self._tiling(problem, 16, 8).chunks(problem) < 2:
            return "a channel block has one chunk only"
        return None

    def heuristic(self, problem: Problem, device: Device) -> Config:
        return self.configs(problem, device)[0]

    def configs(self, problem: Problem, device: Device) -> list[Config]:
        """Every width of channel blocks with every number of them at once, the best first."""
        found = []
        widths = (16, 32, 64) if problem.view.channels_last else (1,)
        for width, (warps, each) in itertools.product(widths, WARPS.items()):
            tiling = self._tiling(problem, width, warps)
            blocks, chunks = tiling.channel_blocks(problem), tiling.chunks(problem)
            programs, at_once = device.sms * each, 1
            while at_once < 2 * blocks and at_once <= min(programs // 2, MOST_BLOCKS):
                sets = min(at_once, blocks)
                readable = MEETING_VALUES * warps // max(16, tiling.block_c)
                splits = min(programs // sets, chunks, readable)
                if splits >= 2:
                    config = self._filled(problem, device, tiling, sets, splits)
                    found += [config, replace(config, evict_first=False)]
                at_once *= 2
        return sorted(dict.fromkeys(found), key=lambda c: self.predict(problem, c, device))

    def model_bytes(self, problem: Problem, config: Config) -> int:
        """Every tensor once, and a second read of what is not kept, wherever it comes from."""
        tensors = 1 if problem.direction == "forward" else 2 + problem.reads_residual
        view, size = problem.view, problem.dtype.itemsize
        again = tensors * size * view.c * self._streamed(problem, config, view.p, config.block_p)
        if problem.direction == "backward" and problem.mask:
            if view.channels_last:
                again += self._streamed(problem, config, view.p, config.block_p) * cdiv(view.c, 8)
            else:
                bits, block = cdiv(view.p, 8), config.block_p // 8
                again += self._streamed(problem, config, bits, block) * view.c
        return minimum_bytes(problem) + again

    def dram_bytes(self, problem: Problem, config: Config, device: Device) -> float:
        """The blocks of a group that are worked on together share the L2 cache."""
        groups = cdiv(config.channel_blocks(problem), config.at_once)
        once = minimum_bytes(problem)
        again = self.model_bytes(problem, config) - once
        return once + max(0.0, again - groups * L2_SHARE * device.l2_bytes)

    def predict(self, problem: Problem, config: Config, device: Device) -> float:
        groups = cdiv(config.channel_blocks(problem), config.at_once)
        each = WARPS.get(config.num_warps, 1)
        programs = config.at_once * config.splits
        moved = self.dram_bytes(problem, config, device)
        seconds = predicted_seconds(device, moved, programs, 1, programs_per_sm=each)
        # While one program of a multiprocessor waits the others go on; the last wait is exposed.
        return seconds + MEETING_SECONDS * (1 + (groups - 1) / each)

    def _streamed(self, problem: Problem, config: Config, length: int, block: int) -> int:
        """Of a channel's [N, length] in blocks of `block`, what its programs read twice."""
        n, block_n = problem.view.n, config.block_n
        per_sample = cdiv(length, block)

        def before(chunk: int) -> int:
            """How much lies in the chunks before this one."""
            rows, rest = divmod(chunk, per_sample)
            samples = min(rows * block_n, n)
            return samples * length + min(block_n, n - samples) * min(rest * block, length)

        own = cdiv(config.chunks(problem), config.splits)
        starts = range(0, own * config.splits, own)
        return sum(before(first + own - config.kept) - before(first) for first in starts)

    def _tiling(self, problem: Problem, width: int, warps: int) -> Config:
        """Chunks of `TILE` elements a warp, `width` channels wide where channels are contiguous.

        Half of that where every element has an address of its own: with all of it the backward of
        BN+add+gelu on planes of 7 by 7 spills in fp32 on sm_90.
        """
        view, elements = problem.view, TILE * warps // (2 if problem.vector == 1 else 1)
        bits = 8 if problem.mask else 1
        if view.channels_last:
            block_c = max(bits, width)
            most = elements // block_c
            block_p = power_of_two_blocks(view.p, most, max(1, most // 4))
            return Config(block_c, 1, block_p, num_warps=warps)
        block_p = max(bits, power_of_two_blocks(view.p, elements, 64))
        block_n = power_of_two_blocks(view.n, max(1, elements // block_p), 1)
        return Config(1, block_n, block_p, num_warps=warps)

    def _filled(
        self, problem: Problem, device: Device, tiling: Config, sets: int, splits: int
    ) -> Config:
        """As many chunks kept as the registers hold, and no program without chunks."""
        own = cdiv(tiling.chunks(problem), splits)
        payload = next(most for arch, most in PAYLOAD.items() if device.arch.startswith(arch))
        threads = tiling.num_warps * device.warp
        room = int(payload * threads / (registers_kept(problem) * tiling.tile))
        config = Config(
            *(tiling.block_c, tiling.block_n, tiling.block_p),
            splits=cdiv(tiling.chunks(problem), own),
            num_warps=tiling.num_warps,
            kept=min(own, room),
            at_once=sets,
        )
        cached = self.dram_bytes(problem, config, device) == minimum_bytes(problem)
        return config if cached else replace(config, evict_first=True)

    def forward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[ForwardArguments], None]:
        launches = [
            self._launch(
                kernels.forward_kernel, problem, config, CUMULATIVE=c, **epilogue.forward()
            )
            for c in (False, True)
        ]

        def run(a: ForwardArguments) -> None:
            assert a.mean is not None
            launches[advance_counter(a)](
                *(a.x, a.y, a.residual, a.mask, _partial(config, a.mean, 4)),
                *(_semaphores(a.x, config.at_once), a.mean, a.rstd, a.weight, a.bias),
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
                *(a.dy, a.x, a.residual, a.mask, a.dx, a.dresidual),
                *(_partial(config, a.rstd, 2 if a.dslope is None else 3),),
                *(_semaphores(a.x, config.at_once), a.mean, a.rstd),
                *(a.weight, a.bias, a.slope, a.dweight, a.dbias, a.dslope),
            )

        return run

    def _launch(self, kernel: Any, problem: Problem, config: Config, **meta: Any) -> Launch:
        view = problem.view
        streamed = cdiv(config.chunks(problem), config.splits) - config.kept
        groups = cdiv(config.channel_blocks(problem), config.at_once)
        tensors = 1 if problem.direction == "forward" else 2
        return Launch(
            kernel,
            (config.at_once, config.splits),
            (view.n, view.c, view.p, *x_strides(problem), streamed, groups),
            config.num_warps,
            cooperative=True,
            **meta,
            ONCE="evict_first" if config.evict_first else "",
            KEPT=config.kept,
            BATCH=max(1, BATCH_BYTES // problem.dtype.itemsize // tensors),
            SPLITS=config.splits,
            **config.geometry(problem),
        )


def _partial(config: Config, like: Tensor, quantities: int) -> Tensor:
    """Workspace for what the programs tell each other, two rounds of it."""
    return like.new_empty((2, quantities, config.splits, config.at_once * config.block_c))


_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def _semaphores(x: Tensor, blocks: int) -> Tensor:
    """Zeros, or what earlier launches left there, which is as good (see `_barrier`).

    Two launches that run at the same time must not share them. Launches on one stream follow each
    other, so each stream has its own. A captured graph may be replayed on any stream: it has its
    own, part of its memory, which it sets to zero at every replay.
    """
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(blocks, dtype=torch.int32, device=x.device)
    key = (x.device, torch.cuda.current_stream(x.device).cuda_stream)
    if key not in _of_stream:
        _of_stream[key] = torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=x.device)
    return _of_stream[key]
