"""Statistics: mean and centred second moment, never E[x^2] - E[x]^2.

Tiles add up element by element, so that a loop over them has no reduction and its threads never
wait for each other: sums of x - pivot and of its square, where the pivot is the mean of the first
tile. After a run of tiles these become moments, and the next run has a pivot of its own. Moments of
runs, programs and splits are merged with the formula of Chan, Golub and LeVeque (1979). Sums run in
a fixed order, so the same plan gives the same bits twice.
"""

import triton
import triton.language as tl

# Tiles that share a pivot. Where the first of T tiles lies apart and the rest hardly vary, the
# variance of one run loses up to T^2 units of rounding: with T = 500 its relative error is 6e-3, in
# runs of 32 3e-5, of 16 4e-6, of 8 2e-6 (float32; `tests/test_numerics.py` has such data).
RUN = tl.constexpr(16)


@triton.jit
def finite(v):
    """0 where a value is infinite or NaN."""
    return tl.where(tl.abs(v) < float("inf"), v, 0.0)


@triton.jit
def settled(v, some):
    """v before a sum over threads; `some` is true, but the compiler cannot know that.

    A product as it is would be fused with the addition of what another thread has, one way here and
    the other way there; threads that are to have the same sum would differ in its last bit. There
    is nothing to fuse with a choice. Adding 0 would not do: of a square LLVM leaves that out.
    """
    return tl.where(some, v, 0.0)


@triton.jit
def exist(N, C, P):
    """What `settled` asks for: sizes are positive, and so are their bits together. A sum of them
    may pass 2^31."""
    return (N | C | P) > 0


@triton.jit
def mean_of(x, valid, size):
    """The mean of each row of a tile.

    x  # [BLOCK_C, BLOCK_M] accumulator dtype; valid: broadcasts; size: valid columns of a row
    """
    return tl.sum(tl.where(valid, x * (1.0 / tl.maximum(size, 1.0)), 0.0), 1)


@triton.jit
def pivot(x, valid, size):
    """The mean of each row of a tile; 0 where it is not finite.

    Moments are those of x - pivot. That the pivot is the mean of values which count themselves
    bounds what the subtraction in `centred` can cost: see `docs/kernels.md`.
    """
    return finite(mean_of(x, valid, size))


@triton.jit
def begin_run(BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr):
    """Of no tile yet: the number of values, their pivot, and the two sums of `add_tile`."""
    empty = tl.zeros([BLOCK_C, BLOCK_M], ACC)
    return tl.zeros([], ACC), tl.zeros([BLOCK_C], ACC), empty, empty


@triton.jit
def add_tile(sums, squares, x, first, valid):
    """Add a tile less its pivot, and the square of that, element by element.

    sums, squares, x  # [BLOCK_C, BLOCK_M] accumulator dtype; first, valid: broadcast
    """
    shifted = tl.where(valid, x - first, 0.0)
    return sums + shifted, squares + shifted * shifted


@triton.jit
def centred(total, square, count):
    """The centred second moment of values by their sum and sum of squares; both less a pivot."""
    m2 = square - total * (total / tl.maximum(count, 1.0))
    return tl.where(m2 < 0.0, 0.0, m2)  # a NaN stays


@triton.jit
def merge_moments(count, total, m2, tile_count, tile_total, tile_m2):
    """Merge the moments of a tile into running ones (Chan et al.); counts are floats, 0 if empty.

    Sums and not means: an infinite value then makes the mean infinite, as in PyTorch, not NaN.
    """
    both = count + tile_count
    delta = tile_total / tl.maximum(tile_count, 1.0) - total / tl.maximum(count, 1.0)
    weight = count * (tile_count / tl.maximum(both, 1.0))
    # In this order an overflow of delta * delta times no weight is not NaN.
    return both, total + tile_total, m2 + tile_m2 + delta * weight * delta


@triton.jit
def merge_run(count, base, total, m2, size, first, run_total, run_square):
    """Merge the sums of a run, which are less its pivot `first`, into moments whose total is less
    `base`, the pivot of the first run that had a value."""
    base = tl.where(count > 0.0, base, first)
    run_m2 = centred(run_total, run_square, size)
    # Squares of finite values may overflow: a variance of infinity then, not inf - inf.
    over = (run_square == float("inf")) & (tl.abs(run_total) < float("inf"))
    run_m2 = tl.where(over, run_square, run_m2)
    run_total += (first - base) * size
    count, total, m2 = merge_moments(count, total, m2, size, run_total, run_m2)
    return count, base, total, m2


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
