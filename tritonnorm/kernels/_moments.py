"""Statistics: mean and centred second moment, never E[x^2] - E[x]^2.

A tile is reduced in two passes over registers; tiles and splits are merged with the formula of
Chan, Golub and LeVeque (1979). Sums run in a fixed order, so the same plan gives the same bits
twice.
"""

import triton
import triton.language as tl


@triton.jit
def tile_moments(x, mask, count):
    """Mean and centred second moment of each row of a tile.

    x  # [BLOCK_C, BLOCK_M] accumulator dtype, 0 where mask is false; count: valid columns of a row
    """
    mean = tl.sum(x, 1) / count
    centred = tl.where(mask, x - mean[:, None], 0.0)
    return mean, tl.sum(centred * centred, 1)


@triton.jit
def merge_moments(count, mean, m2, tile_count, tile_mean, tile_m2):
    """Merge the moments of a tile into running ones (Chan et al.); counts are floats."""
    total = count + tile_count
    share = tile_count / total
    delta = tile_mean - mean
    return total, mean + delta * share, m2 + tile_m2 + delta * delta * (count * share)


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
