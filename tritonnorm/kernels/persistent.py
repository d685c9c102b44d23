"""Programs that share a channel block meet: one launch, and what is read twice is near.

The programs of a channel block keep what they can of it in registers, and leave the rest to the L2
cache. After the first pass they exchange moments (or sums) and meet; the second pass takes the
registers first, then the rest in reverse. Channel blocks that do not fit together go one group
after the other, and each set of programs goes on to its next block without waiting for the other
sets. A program may also keep nothing and make the first pass over its next block before the second
over this one; it then has something to do while it would wait. Forward moves 2S and backward 3S as
far as a group fits in registers and L2; where it does not, what is accessed once is marked to leave
the cache first.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from tritonnorm.device import Device
from tritonnorm.problem import Problem, minimum_bytes

from . import _persistent as forward_kernels
from . import _persistent_backward as backward_kernels
from . import planes
from .base import (
    L2_SHARE,
    MOST_FILLED,
    BackwardArguments,
    Config,
    EpilogueArguments,
    ForwardArguments,
    Launch,
    advance_counter,
    cdiv,
    mask_in_words,
    predicted_seconds,
    registers_kept,
    x_strides,
)
from .lasting import Semaphores
from .tiling import power_of_two_blocks

# Warps of a program -> programs on a multiprocessor. At up to 255 registers a thread (256 on CDNA,
# where a wavefront has 64 lanes) 8 warps fill its register file, so these are always co-resident.
# Where there is more than one, others work while one waits.
WARPS = {8: 1, 4: 2}
# 32-bit registers a thread may spend on what it keeps, by the start of the architecture, with many
# channels and with one: the rest is for addresses, reductions and the residual. The compile audit
# finds no spill with them, and with many it does with 36 on sm_90 (BN+add+relu, bf16 NHWC: 16) and
# sm_100 (BN+gelu: 2), with 48 on gfx942, where a program has twice the threads.
PAYLOAD = {"sm_": (28, 32), "gfx": (24, 24)}
TILE = 512  # elements of a chunk for each warp: two 16-byte accesses of 16-bit data a thread
# Bytes that a multiprocessor has on their way where its programs stream. By Little's law an H200
# needs 4.8 TB/s / 132 times about 0.8 microseconds = 29 KB, all the time.
ON_THEIR_WAY = 3 << 14
# Shared memory for it on a multiprocessor, with what is worked on: consumer GPUs have 100 KB.
MOST_SHARED = 80 << 10
# Values of each quantity that a program reads at a meeting, for each warp: 16 registers a thread.
# With 64 channels and 126 splits (64 registers) the compile audit finds 126 spills.
MEETING_VALUES = 512
# How long a meeting takes: the last sums, two trips to the L2 cache, the wait for the slowest, what
# the others left, and the first chunks of what follows. An estimate, to be measured.
MEETING_SECONDS = 3e-6
# What of it is left for a program that waits for no other, as it goes on with the next group first:
# the trips to memory between its loops. An estimate, too.
BETWEEN_LOOPS_SECONDS = 1.5e-6
MOST_BLOCKS = Semaphores.MOST // 2  # channel blocks at once; those of two groups may overlap
_semaphores = Semaphores()


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
        if not (widths := planes.row_widths(problem)):
            return "elements are loaded one by one, which a pipeline cannot do, or not fast enough"
        seen, width = widths[0]
        if device.sms - device.held < 2 or self._tiling(seen, device, width, 8).chunks(seen) < 2:
            return "a channel block has one chunk only"
        return None

    def heuristic(self, problem: Problem, device: Device) -> Config:
        return self.configs(problem, device)[0]

    def configs(self, problem: Problem, device: Device) -> list[Config]:
        """Every width of channel blocks with every number of them at once, the best first."""
        found = []
        for (seen, width), (warps, each) in itertools.product(
            planes.row_widths(problem), WARPS.items()
        ):
            tiling = self._tiling(seen, device, width, warps)
            blocks, chunks = planes.blocks_of(problem, tiling), tiling.chunks(seen)
            programs, at_once = (device.sms - device.held) * each, 1
            while at_once < 2 * blocks and at_once <= min(programs // 2, MOST_BLOCKS):
                sets = min(at_once, blocks)
                readable = MEETING_VALUES * warps // max(8, tiling.block_c)
                splits = min(programs // sets, chunks, readable)
                if splits >= 2:
                    config = self._filled(problem, device, tiling, sets, splits)
                    found += [config, replace(config, evict_first=False)]
                    overlap = self._overlapping(problem, config)
                    if sets < blocks and self._cached(problem, overlap, device):
                        found += [overlap, replace(overlap, evict_first=False)]
                at_once *= 2
        return sorted(dict.fromkeys(found), key=lambda c: self.predict(problem, c, device))

    def model_bytes(self, problem: Problem, config: Config) -> int:
        """Every tensor once, and a second read of what is not kept, wherever it comes from."""
        problem, once = planes.seen_as(problem, config), minimum_bytes(problem)
        tensors = 1 if problem.direction == "forward" else 2 + problem.reads_residual
        view, size, kept = problem.view, problem.dtype.itemsize, config.kept
        again = tensors * size * view.c * self._streamed(problem, config, view.p, 1, kept)
        if problem.direction == "backward" and problem.mask:
            if view.channels_last:
                again += self._streamed(problem, config, view.p, 1, kept) * cdiv(view.c, 8)
            elif not mask_in_words(config, problem):
                again += self._streamed(problem, config, cdiv(view.p, 8), 8, kept) * view.c
            else:  # loops read whole words, in both passes
                pipelined = self._kept_apart(problem, config)
                words = 4 * self._streamed(problem, config, cdiv(view.p, 32), 32, pipelined)
                more = words - self._streamed(problem, config, cdiv(view.p, 8), 8, pipelined)
                twice = view.n * cdiv(view.p, 8) + more if config.overlaps else words
                again += view.c * (more + twice)
        return once + again

    def dram_bytes(self, problem: Problem, config: Config, device: Device) -> float:
        """The blocks of a group that are worked on together share the L2 cache."""
        groups = cdiv(planes.blocks_of(problem, config), config.at_once)
        once = minimum_bytes(problem)
        again = self.model_bytes(problem, config) - once
        if not config.overlaps:
            return once + max(0.0, again - groups * L2_SHARE * device.l2_bytes)
        # Between the two reads of a group come the second of the one before, with what that writes,
        # and the first of the next one.
        each, more = again / groups, (once - again) / again
        near = (device.l2_bytes - each * (2 + more)) / (1 + more)
        return once + again - groups * min(each, max(0.0, near))

    def predict(self, problem: Problem, config: Config, device: Device) -> float:
        groups = cdiv(planes.blocks_of(problem, config), config.at_once)
        each = WARPS.get(config.num_warps, 1)
        programs = config.at_once * config.splits
        moved = self.dram_bytes(problem, config, device)
        if device.held:  # the rest is enough for the bandwidth, with more on its way in each
            programs = programs * device.sms // (device.sms - device.held)
        seconds = predicted_seconds(device, moved, programs, 1, programs_per_sm=each)
        if config.overlaps:  # the programs of a multiprocessor part, and one covers the other
            return seconds + MEETING_SECONDS + BETWEEN_LOOPS_SECONDS * (groups - 1) / each
        return seconds + MEETING_SECONDS * groups

    def _kept_apart(self, problem: Problem, config: Config) -> int:
        """Chunks of a program that do not pass through its loops: those that it keeps, or the last
        two, of which one may not be whole, and forward needs another for its pivot."""
        return config.kept or min(2, cdiv(config.chunks(problem), config.splits))

    def _streamed(self, problem: Problem, config: Config, length: int, unit: int, kept: int) -> int:
        """Of a channel's [N, length], a unit for so many positions, what its programs read apart
        from their last chunks, as many as are ``kept``."""
        block = config.block_p // unit
        n, block_n = problem.view.n, config.block_n
        per_sample = cdiv(length, block)

        def before(chunk: int) -> int:
            """How much lies in the chunks before this one."""
            rows, rest = divmod(chunk, per_sample)
            samples = min(rows * block_n, n)
            return samples * length + min(block_n, n - samples) * min(rest * block, length)

        chunks = config.chunks(problem)
        own = cdiv(chunks, config.splits)
        found = 0
        for first in range(0, chunks, own):
            kept_from = max(first, min(first + own, chunks) - kept)
            found += before(kept_from) - before(first)
        return found

    def _tiling(self, problem: Problem, device: Device, width: int, warps: int) -> Config:
        """Chunks of `TILE` elements a warp, `width` channels wide where channels are contiguous.

        Half of that for the derivative of a smooth activation of a sum (BN+add+gelu, fp16 NHWC,
        sm_90: 32 bytes of stack with all of it), on sm_100 without a sum, too (BN+gelu: 8). Twice
        of it in forward where a program has one channel, and so registers to spare: what a turn of
        a loop costs beside its elements then counts half (BN, 64x256x56x56, sm_90: 197 instructions
        for 32 bytes of a thread, 303 for 64 with twice the tile).
        """
        view = problem.view
        derived = problem.direction == "backward" and problem.activity == "smooth"
        derived &= problem.reads_residual or device.arch.startswith("sm_10")
        elements = TILE * warps // (2 if derived else 1)
        if problem.direction == "forward" and not view.channels_last:
            elements *= 2
        room = self._payload(problem, device) * warps * device.warp / registers_kept(problem)
        if problem.direction == "forward":
            room /= 2  # the last chunk may have few values, and a pivot is the mean of many
        while elements > room:
            elements //= 2
        bits = 8 if problem.mask else 1
        if view.channels_last:
            block_c = max(bits, width)
            most = max(1, elements // block_c)
            block_p = power_of_two_blocks(view.p, most, max(1, most // 4))
            return Config(block_c, 1, block_p, num_warps=warps)
        block_p = max(bits, power_of_two_blocks(view.p, elements, 64))
        block_n = power_of_two_blocks(view.n, max(1, elements // block_p), 1)
        return Config(1, block_n, block_p, num_warps=warps)

    def _payload(self, problem: Problem, device: Device) -> float:
        """Registers of a thread for what it keeps. As in `resident` the derivative of a smooth
        activation leaves less (BN+silu, bf16 NHWC, sm_90: 16 bytes of stack with all of them; on
        sm_100 with 7/8 still 24, 64x144x56x56, and with 3/4 NCHW 8, 64x96x56x56)."""
        many, one = next(each for arch, each in PAYLOAD.items() if device.arch.startswith(arch))
        most = many if problem.view.channels_last else one
        derived = problem.direction == "backward" and problem.activity == "smooth"
        if derived:
            return most * (0.7 if device.arch.startswith("sm_10") else MOST_FILLED)
        return most

    def _filled(
        self, problem: Problem, device: Device, tiling: Config, sets: int, splits: int
    ) -> Config:
        """As many chunks kept as the registers hold, and no program without chunks."""
        seen = planes.seen_as(problem, tiling)
        own = cdiv(tiling.chunks(seen), splits)
        registers = self._payload(seen, device) * tiling.num_warps * device.warp
        room = int(registers / (registers_kept(seen) * tiling.tile))
        config = Config(
            *(tiling.block_c, tiling.block_n, tiling.block_p),
            splits=cdiv(tiling.chunks(seen), own),
            num_warps=tiling.num_warps,
            kept=min(own, room),
            at_once=sets,
        )
        return replace(config, evict_first=not self._cached(problem, config, device))

    def _overlapping(self, problem: Problem, config: Config) -> Config:
        """The same without what is kept. The derivative of a smooth activation has 8 elements a
        thread then: with 16, 4 spills on sm_90 (BN+silu, bf16 NHWC, 64x240x28x28)."""
        block_p = config.block_p
        if problem.direction == "backward" and problem.activity == "smooth":
            block_p = min(block_p, max(1, block_p * TILE * config.num_warps // (2 * config.tile)))
        config = replace(config, block_p=block_p, kept=0, evict_first=True)
        chunks = config.chunks(planes.seen_as(problem, config))
        # Half of a block may lie beyond the last position: fewer than twice as many chunks.
        return replace(config, splits=cdiv(chunks, cdiv(chunks, config.splits)))

    def _cached(self, problem: Problem, config: Config, device: Device) -> bool:
        """Whether all that is read twice is still near the second time."""
        return self.dram_bytes(problem, config, device) == minimum_bytes(problem)

    def forward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[ForwardArguments], None]:
        launches = [
            self._launch(
                forward_kernels.forward_kernel, problem, config, CUMULATIVE=c, **epilogue.forward()
            )
            for c in (False, True)
        ]

        def run(a: ForwardArguments) -> None:
            assert a.mean is not None
            launches[advance_counter(a)](
                *(a.x, a.y, a.residual, a.mask, *_shared(config, a.x, a.mean, 4)),
                *(a.mean, a.rstd, a.weight, a.bias, a.slope),
                *(a.running_mean, a.running_var, a.counter),
                *(a.eps, 0.0 if a.momentum is None else a.momentum),
            )

        return run

    def backward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[BackwardArguments], None]:
        launch = self._launch(
            *(backward_kernels.backward_kernel, problem, config),
            WORDS=mask_in_words(config, planes.seen_as(problem, config)),
            **epilogue.backward(),
        )

        def run(a: BackwardArguments) -> None:
            launch(
                *(a.dy, a.x, a.residual, a.mask, a.dx, a.dresidual),
                *_shared(config, a.x, a.rstd, 2 if a.dslope is None else 3),
                *(a.mean, a.rstd, a.weight, a.bias, a.slope),
                *(a.dweight, a.dbias, a.dslope),
            )

        return run

    def _launch(self, kernel: Any, problem: Problem, config: Config, **meta: Any) -> Launch:
        groups = cdiv(planes.blocks_of(problem, config), config.at_once)
        meta |= planes.geometry(problem, config)
        problem = planes.seen_as(problem, config)
        view = problem.view
        chunks = config.chunks(problem)
        own = cdiv(chunks, config.splits)
        tensors = 1 if problem.direction == "forward" else 2 + problem.reads_residual
        chunk = tensors * config.tile * problem.dtype.itemsize * WARPS.get(config.num_warps, 1)
        return Launch(
            kernel,
            (config.at_once, config.splits),
            (view.n, view.c, view.p, *x_strides(problem), own, chunks, groups),
            config.num_warps,
            cooperative=True,
            **meta,
            ONCE="evict_first" if config.evict_first else "",
            OVERLAP=config.overlaps,
            KEPT=self._kept_apart(problem, config),
            WHOLE=view.channels_last or view.p % config.block_p == view.n % config.block_n == 0,
            EVEN=meta["PLANE"] == 1 and view.c % config.block_c == 0,
            STAGES=1 + max(1, min(cdiv(ON_THEIR_WAY, chunk), MOST_SHARED // chunk - 1)),
            SPLITS=config.splits,
        )


def _shared(config: Config, x: Tensor, like: Tensor, quantities: int) -> tuple[Tensor, Tensor]:
    """Workspace for what the programs tell each other, in rounds, and where they meet."""
    rounds = 4 if config.overlaps else 2
    partial = (rounds, quantities, config.splits, config.at_once * config.block_c)
    return like.new_empty(partial), _semaphores.of(x, config.at_once * (1 + config.overlaps))
