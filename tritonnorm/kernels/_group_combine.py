"""The small kernels between and after the passes over groups: partial results to whole ones."""

import triton
import triton.language as tl

from . import _moments as moments


@triton.jit(do_not_specialize=["SPLITS", "OF_GROUP", "STATISTICS"])
def combine_moments_kernel(
    partial_ptr,  # [3, SPLITS, STATISTICS * OF_GROUP]
    mean_ptr,  # [STATISTICS] out, or None
    rstd_ptr,  # [STATISTICS] out
    eps: tl.float64,
    SPLITS,
    OF_GROUP,  # sums of a group: its channels, 1 for a row
    STATISTICS,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the moments of each group: all means first, then all deviations."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.cast(STATISTICS, tl.int64) * OF_GROUP
    count = tl.zeros([BLOCK_C], ACC)
    mean = tl.zeros([BLOCK_C], ACC)
    m2 = tl.zeros([BLOCK_C], ACC)
    for s0 in range(0, SPLITS * OF_GROUP, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < SPLITS * OF_GROUP)[:, None] & (row < STATISTICS)[None, :]
        split, k = s // OF_GROUP, s % OF_GROUP
        lane = (split.to(tl.int64) * sums + k)[:, None] + (row.to(tl.int64) * OF_GROUP)[None, :]
        at = partial_ptr + lane
        block_count = tl.load(at, mask=valid, other=0.0)
        block_mean = tl.load(at + SPLITS * sums, mask=valid, other=0.0)
        block_m2 = tl.load(at + 2 * SPLITS * sums, mask=valid, other=0.0)
        total = tl.maximum(tl.sum(block_count, 0), 1.0)
        weighted = moments.settled(block_count * block_mean, STATISTICS + SPLITS > 0)
        centre = tl.sum(weighted, 0) / total
        delta = tl.where(valid, block_mean - centre[None, :], 0.0)
        spread = tl.sum(block_m2 + block_count * delta * delta, 0)
        count, mean, m2 = moments.merge_means(count, mean, m2, total, centre, spread)
    rstd = 1.0 / tl.sqrt(m2 / count + tl.full([], eps, ACC))
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=row < STATISTICS)
    tl.store(rstd_ptr + row, rstd, mask=row < STATISTICS)


@triton.jit(do_not_specialize=["SPLITS", "OF_GROUP", "STATISTICS"])
def combine_sums_kernel(
    partial_ptr,  # [2, SPLITS, STATISTICS * OF_GROUP]
    sums_ptr,  # [2, STATISTICS] out
    SPLITS,
    OF_GROUP,
    STATISTICS,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the sums of each group in a fixed order."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.cast(STATISTICS, tl.int64) * OF_GROUP
    sum_g = tl.zeros([BLOCK_C], ACC)
    sum_gn = tl.zeros([BLOCK_C], ACC)
    for s0 in range(0, SPLITS * OF_GROUP, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < SPLITS * OF_GROUP)[:, None] & (row < STATISTICS)[None, :]
        split, k = s // OF_GROUP, s % OF_GROUP
        lane = (split.to(tl.int64) * sums + k)[:, None] + (row.to(tl.int64) * OF_GROUP)[None, :]
        sum_g += tl.sum(tl.load(partial_ptr + lane, mask=valid, other=0.0), 0)
        sum_gn += tl.sum(tl.load(partial_ptr + SPLITS * sums + lane, mask=valid, other=0.0), 0)
    tl.store(sums_ptr + row, sum_g, mask=row < STATISTICS)
    tl.store(sums_ptr + STATISTICS + row, sum_gn, mask=row < STATISTICS)


@triton.jit(do_not_specialize=["PARTS"])
def combine_parameters_kernel(
    partial_ptr,  # [2, PARTS, C] sums of g and of g * normalized x
    dweight_ptr,  # [C] out, or None
    dbias_ptr,  # [C] out, or None
    C,
    PARTS,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the sums of all parts in a fixed order."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_g = tl.zeros([BLOCK_C], ACC)
    sum_gn = tl.zeros([BLOCK_C], ACC)
    for s0 in range(0, PARTS, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < PARTS)[:, None] & (c < C)[None, :]
        at = partial_ptr + s.to(tl.int64)[:, None] * C + c[None, :]
        if dbias_ptr is not None:
            sum_g += tl.sum(tl.load(at, mask=valid, other=0.0), 0)
        if dweight_ptr is not None:
            plane = tl.cast(PARTS, tl.int64) * C
            sum_gn += tl.sum(tl.load(at + plane, mask=valid, other=0.0), 0)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_g.to(dbias_ptr.dtype.element_ty), mask=c < C)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, sum_gn.to(dweight_ptr.dtype.element_ty), mask=c < C)
