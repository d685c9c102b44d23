"""Statistics: mean and centred second moment, never E[x^2] - E[x]^2.

A tile is reduced in two passes over registers; tiles and splits are merged with the formula of
Chan, Golub and LeVeque (1979). All of it is relative to a pivot, a value of the channel. Sums run
in a fixed order, so the same plan gives the same bits twice.
"""

import triton
import triton.language as tl


@triton.jit
def pivot(x):
    """The first value of each row of a tile, 0 where it is not finite.

    Moments are those of x - pivot: a mean far from zero then costs no digits.
    """
    column = tl.arange(0, x.shape[1])
    first = tl.sum(tl.where((column == 0)[None, :], x, 0.0), 1)
    return tl.where(tl.abs(first) < float("inf"), first, 0.0)


@triton.jit
def tile_moments(x, first, mask, count):
    """Sum and centred second moment of each row of a tile, less its pivot.

    x  # [BLOCK_C, BLOCK_M] accumulator dtype; first  # [BLOCK_C]; count: valid columns of a row
    """
    shifted = tl.where(mask, x - first[:, None], 0.0)
    total = tl.sum(shifted, 1)
    centred = tl.where(mask, shifted - (total / count)[:, None], 0.0)
    return total, tl.sum(centred * centred, 1)


@triton.jit
def merge_moments(count, total, m2, tile_count, tile_total, tile_m2):
    """Merge the moments of a tile into running ones (Chan et al.); counts are floats, 0 if empty.

    Sums and not means: an infinite value then makes the mean infinite, as in PyTorch, not NaN.
    """
    both = count + tile_count
    delta = tile_total / tl.maximum(tile_count, 1.0) - total / tl.maximum(count, 1.0)
    weight = count * (tile_count / tl.maximum(both, 1.0))
    return both, total + tile_total, m2 + tile_m2 + delta * delta * weight


@triton.jit
def merge_means(count, mean, m2, tile_count, tile_mean, tile_m2):
    """`merge_moments` of means, where there is no pivot; counts are floats, 0 if empty."""
    both = count + tile_count
    share = tile_count / tl.maximum(both, 1.0)
    delta = tile_mean - mean
    return both, mean + delta * share, m2 + tile_m2 + delta * delta * count * share


@triton.jit
def rows_moments(counts, firsts, totals, squares, base):
    """Count, sum less `base` and centred second moment of rows with a pivot each.

    counts, firsts, totals, squares  # [ROWS, BLOCK_C], 0 where there is no row; base  # [BLOCK_C]
    """
    means = (firsts - base[None, :]) + totals / tl.maximum(counts, 1.0)
    count = tl.sum(counts, 0)
    total = tl.sum(tl.where(counts > 0.0, counts * means, 0.0), 0)
    delta = tl.where(counts > 0.0, means - (total / tl.maximum(count, 1.0))[None, :], 0.0)
    return count, total, tl.sum(squares + counts * delta * delta, 0)


@triton.jit
def store_statistics(
    c,  # [BLOCK_C] channels
    mean,  # [BLOCK_C]
    m2,  # [BLOCK_C] sum of squared deviations
    rstd,  # [BLOCK_C]
    count,  # values per channel, accumulator dtype
    C,
    mean_ptr,  # [C] out
    rstd_ptr,  # [C] out
    running_mean_ptr,  # [C] updated in place, or None
    running_var_ptr,  # [C] updated in place, or None
    counter_ptr,  # [] int64 num_batches_tracked, or None
    momentum,  # weight of the new observation; unused when CUMULATIVE
    CUMULATIVE: tl.constexpr,  # weight = 1 / counter, which the launcher has already advanced
):
    """Write the batch statistics of a channel block and move the running ones towards them."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    valid = c < C
    tl.store(mean_ptr + c, mean, mask=valid)
    tl.store(rstd_ptr + c, rstd, mask=valid)
    if running_mean_ptr is not None:
        if CUMULATIVE:
            weight = 1.0 / tl.load(counter_ptr).to(ACC)
        else:
            weight = tl.full([], momentum, ACC)
        unbiased = m2 / tl.maximum(count - 1.0, 1.0)
        old_mean = tl.load(running_mean_ptr + c, mask=valid, other=0.0).to(ACC)
        old_var = tl.load(running_var_ptr + c, mask=valid, other=0.0).to(ACC)
        new_mean = (1.0 - weight) * old_mean + weight * mean
        new_var = (1.0 - weight) * old_var + weight * unbiased
        tl.store(running_mean_ptr + c, new_mean.to(running_mean_ptr.dtype.element_ty), mask=valid)
        tl.store(running_var_ptr + c, new_var.to(running_var_ptr.dtype.element_ty), mask=valid)
    if counter_ptr is not None:
        if not CUMULATIVE:
            if tl.program_id(0) == 0:
                tl.store(counter_ptr, tl.load(counter_ptr) + 1)
