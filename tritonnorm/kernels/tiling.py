"""Sizes of tiles and numbers of splits: what a formula picks, and its neighbours."""

from __future__ import annotations

from dataclasses import replace

import torch

from tritonnorm.device import Device
from tritonnorm.problem import Problem

from .base import Config, cdiv, mask_in_words, next_power_of_2

# Elements of a tile, with 4 warps: 32 a thread, four 16-byte loads of bf16 in flight per tensor.
# In float64 a quarter, the same bytes: with 4096 the compile audit finds spills on sm_80 (14) and
# on sm_100 (4), with 2048 still 4 on sm_100.
TILE = 4096
TILE_FLOAT64 = 1024
# A smooth activation needs more registers, its derivative most: with 4096 triton 3.6 spills a few
# (mish in fp32 on sm_100 both ways, the backward of gelu in fp16 on sm_80).
TILE_SMOOTH = 2048
# Where every element has an address of its own: with 4096 the moments of planes of 7 by 7 spill 38
# registers on sm_80.
TILE_ALONE = 2048
# Programs per multiprocessor a launch should have. The compile audit finds 48 to 128 registers a
# thread, so 4 to 10 programs of 4 warps are resident at once; more splits would only lengthen the
# combine.
PROGRAMS_PER_SM = 8

# Shared memory of a program for tiles on their way, where a pass only reads. 168 registers a thread
# leave three programs on a multiprocessor; with one tile of each on its way that were 24 KB, less
# than the 29 KB that an H200 needs (see `persistent`).
PIPELINE_BYTES = 48 << 10
MOST_SHARED = 96 << 10  # of a program: consumer GPUs have 100 KB


def power_of_two_blocks(extent: int, limit: int, floor: int) -> int:
    """The power of two between `floor` and `limit` that covers an extent with the least padding.

    Never longer than the extent needs. Padding wastes issue slots, not bandwidth, so up to 1/16
    more of it is accepted for a larger block.
    """
    best = min(limit, next_power_of_2(extent))
    floor = min(floor, best)
    candidates = [best]
    while candidates[-1] > floor:
        candidates.append(candidates[-1] // 2)
    padded = [cdiv(extent, b) * b for b in candidates]
    least = min(padded)
    return next(
        b for b, size in zip(candidates, padded, strict=True) if size <= least + least // 16
    )


def tile_shape(problem: Problem, elements: int, max_block_c: int) -> tuple[int, int, int]:
    """A tile ``(block_c, block_n, block_p)`` of about `elements` that keeps contiguous runs long.

    Channels last: channels first, up to `max_block_c`, then positions. Otherwise one channel,
    positions first (at least 64, or the whole plane: 128 bytes of 16-bit data, a cache line), then
    samples.
    """
    view = problem.view
    bits = 8 if problem.mask else 1  # a mask packs eight neighbours of the contiguous axis
    if view.channels_last:
        block_c = min(max(bits, next_power_of_2(view.c)), max_block_c)
        return block_c, 1, min(next_power_of_2(view.p), max(1, elements // block_c))
    floor = min(64, next_power_of_2(view.p))
    block_p = max(bits, power_of_two_blocks(view.p, elements, floor))
    return 1, min(next_power_of_2(view.n), max(1, elements // block_p)), block_p


def splits_for(config: Config, problem: Problem) -> tuple[int, int, int]:
    """``(splits, chunks per split, chunks)``: the configuration's splits, less those that would be
    empty."""
    chunks = config.chunks(problem)
    per_split = cdiv(chunks, min(config.splits, chunks))
    return cdiv(chunks, per_split), per_split, chunks


def stages(config: Config, problem: Problem, tensors: int) -> int:
    """Tiles of each of some tensors that are on their way or worked on; 1 where the compiler cannot
    pipeline a loop, for its bytes of a mask, or where every copy would be small."""
    if problem.vector * problem.dtype.itemsize < 8:
        return 1
    if problem.mask and tensors > 1 and not mask_in_words(config, problem):
        return 1
    tile = tensors * config.tile * problem.dtype.itemsize
    if 3 * tile <= PIPELINE_BYTES:
        return 3
    return 2 if 2 * tile <= MOST_SHARED else 1


def tile_elements(problem: Problem) -> int:
    """Elements of the tile that the formula takes."""
    if problem.accumulator == torch.float64:
        return TILE_FLOAT64
    if problem.vector == 1 and problem.view.fast > 1:
        return TILE_ALONE
    many = problem.direction == "backward" or problem.dtype.itemsize > 2
    return TILE_SMOOTH if many and problem.activity == "smooth" else TILE


def widest_block(problem: Problem, elements: int) -> int:
    """Channels of a tile at most: 64, and more where there are few positions."""
    return max(64, elements // next_power_of_2(problem.view.p))


def streaming_config(problem: Problem, device: Device) -> Config:
    """Tiles of `TILE` elements, and enough splits of each channel block to fill the device."""
    elements = tile_elements(problem)
    block_c, block_n, block_p = tile_shape(problem, elements, widest_block(problem, elements))
    config = Config(block_c, block_n, block_p)
    blocks = config.channel_blocks(problem)
    splits = cdiv(device.sms * PROGRAMS_PER_SM, blocks)
    splits = max(1, min(splits, config.chunks(problem)))
    return Config(block_c, block_n, block_p, splits)


def streaming_candidates(problem: Problem, device: Device, first: Config) -> list[Config]:
    """Neighbours of a configuration: tiles of half and twice the size, fewer and more splits."""
    found = [first]
    usual = tile_elements(problem)
    for elements in (usual // 2, usual, usual * 2):
        widest = widest_block(problem, elements)
        for max_block_c in (widest, 2 * widest) if problem.view.channels_last else (1,):
            for programs_per_sm in (PROGRAMS_PER_SM // 4, PROGRAMS_PER_SM):
                block_c, block_n, block_p = tile_shape(problem, elements, max_block_c)
                config = Config(block_c, block_n, block_p, num_warps=8 if elements > usual else 4)
                wanted = cdiv(device.sms * programs_per_sm, config.channel_blocks(problem))
                splits = max(1, min(wanted, config.chunks(problem)))
                found.append(replace(config, splits=splits))
    return list(dict.fromkeys(found))
