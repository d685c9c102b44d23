"""Kernels whose programs share a channel block and meet between two passes; see `persistent`.

The programs of a channel block keep what they can of it in registers and leave the rest to the L2
cache; after the first pass they exchange moments (or sums) and meet; the second pass takes the
registers first, then the rest in reverse. Channel blocks that do not fit at once go one group after
the other. Forward moves 2S, backward 3S, as far as a group fits in registers and L2 together. The
loops are pipelined: copies of the next chunks to shared memory are on their way all the time.
"""

import triton
import triton.language as tl

from . import _barrier as barrier
from . import _body as body
from . import _epilogue as epilogue
from . import _moments as moments
from . import _tile as tile


@triton.jit
def _moments_of_block(
    x_ptr, partial_ptr, group, N, C, P, xs_n, xs_c, xs_p, OWN, CHUNKS, ONCE: tl.constexpr,
    ROUNDS: tl.constexpr, KEPT: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, PLANE: tl.constexpr,
    WIDTH: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """First pass: the moments of a program's chunks go to the workspace; its kept chunks come
    back. With PLANE > 1 they are those of the channel, for each of its columns."""
    slot = tl.program_id(0)
    slots = tl.num_programs(0)
    split = tl.program_id(1)
    first = split * OWN
    # What is not whole is among the last chunks, which are kept.
    kept_from = tl.maximum(first, tl.minimum(first + OWN, CHUNKS) - KEPT)
    _c0, c, end = tile.columns_of(group * slots + slot, C, BLOCK_C, PLANE, WIDTH, VEC)
    lane_n, lane_p, _, _, _, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    count, pivot, sums, squares = moments.begin_run(BLOCK_C, BLOCK_N * BLOCK_P, ACC)
    xs = ()
    for k in tl.static_range(KEPT):
        n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        raw = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0,
            eviction_policy=ONCE)  # fmt: skip
        xs = xs + (raw,)
    tile.all_on_their_way(N | C | P)
    for k in tl.static_range(KEPT):
        n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        there = tile.valid_columns(lane_n, lane_p, n0, p0, N, P)
        size = tile.chunk_size(n0, p0, N, P, BLOCK_N, BLOCK_P).to(ACC)
        if k == 0:
            mean = tl.where(c < end, moments.mean_of(xs[0].to(ACC), there, size * PLANE), 0.0)
            pivot = moments.finite(tile.over_plane(mean, PLANE, WIDTH))
        sums, squares = moments.add_tile(sums, squares, xs[k].to(ACC), pivot[:, None], there)
        count += size
    for chunk in tl.range(first, kept_from, num_stages=STAGES):
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        columns, exist = tile.existing(c, end, lane_n, lane_p, n0, p0, N, P, WHOLE, EVEN)
        x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=exist, other=0.0).to(ACC)
        sums, squares = moments.add_tile(sums, squares, x, pivot[:, None], columns)
        count += tile.chunk_size(n0, p0, N, P, BLOCK_N, BLOCK_P).to(ACC)
    count *= PLANE
    total = tile.over_plane(tl.sum(sums, 1), PLANE, WIDTH)
    square = tl.sum(moments.settled(squares, moments.exist(N, C, P)), 1)
    square = tile.over_plane(square, PLANE, WIDTH)
    m2 = moments.centred(total, square, count)
    plane = SPLITS * slots * BLOCK_C
    at = partial_ptr + (group % ROUNDS) * 4 * plane + slot * BLOCK_C + tl.arange(0, BLOCK_C)
    row = at + split * slots * BLOCK_C
    tl.store(row, tl.zeros([BLOCK_C], ACC) + count)
    tl.store(row + plane, pivot)
    tl.store(row + 2 * plane, total)
    tl.store(row + 3 * plane, m2)
    return xs


@triton.jit
def _output_of_block(
    xs, group, x_ptr, y_ptr, residual_ptr, mask_ptr, partial_ptr, mean_ptr, rstd_ptr, weight_ptr,
    bias_ptr, slope_ptr, running_mean_ptr, running_var_ptr, counter_ptr, eps, momentum, N, C, P,
    xs_n, xs_c, xs_p, OWN, CHUNKS, ONCE: tl.constexpr, ROUNDS: tl.constexpr, OVERLAP: tl.constexpr,
    KEPT: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr, CUMULATIVE: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, PLANE: tl.constexpr,
    WIDTH: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Second pass: the statistics of the channel block from what all of its programs left in the
    workspace, then the output of this one's chunks; in reverse, as the last are the nearest."""
    slot = tl.program_id(0)
    slots = tl.num_programs(0)
    split = tl.program_id(1)
    first = split * OWN
    # What is not whole is among the last chunks, which are kept.
    kept_from = tl.maximum(first, tl.minimum(first + OWN, CHUNKS) - KEPT)
    c0, c, end = tile.columns_of(group * slots + slot, C, BLOCK_C, PLANE, WIDTH, VEC)
    lane_n, lane_p, s_n, s_p, lane, x_n, x_p, x_lane = tile.frame(
        c, C, P, xs_n, xs_c, xs_p, BLOCK_N, BLOCK_P, CHANNELS_LAST
    )
    if OVERLAP:
        xs = ()
        for k in tl.static_range(KEPT):
            n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
            valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
            raw = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=valid, other=0.0,
                eviction_policy=ONCE)  # fmt: skip
            xs = xs + (raw,)
    one = tl.full([BLOCK_C], 1.0, ACC)
    own, once_each, channels = tile.channels_of(c, end, C, PLANE)
    scale, shift = epilogue.affine_parameters(own, channels, one, weight_ptr, bias_ptr)
    leak = None
    if slope_ptr is not None:
        leak = epilogue.load_leak(slope_ptr, own, channels, A, ACC)
    plane = SPLITS * slots * BLOCK_C
    at = partial_ptr + (group % ROUNDS) * 4 * plane + slot * BLOCK_C + tl.arange(0, BLOCK_C)
    counts = barrier.rows(at, slots * BLOCK_C, SPLITS, BLOCK_C)
    firsts = barrier.rows(at + plane, slots * BLOCK_C, SPLITS, BLOCK_C)
    totals = barrier.rows(at + 2 * plane, slots * BLOCK_C, SPLITS, BLOCK_C)
    squares = barrier.rows(at + 3 * plane, slots * BLOCK_C, SPLITS, BLOCK_C)
    base = tl.load(at + plane, cache_modifier=".cg")
    count, total, m2 = moments.rows_moments(counts, firsts, totals, squares, base)
    mean = base + total / count
    rstd = 1.0 / tl.sqrt(m2 / count + tl.full([], eps, ACC))
    scale *= rstd
    residuals = ()
    for k in tl.static_range(KEPT):
        n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        to = n0 * s_n + p0 * s_p
        kept = body.load_residual(residual_ptr, xs[k], to, lane, valid, ONCE)
        residuals = residuals + (kept,)
    for k in tl.static_range(KEPT):
        n0, p0 = tile.chunk_origin(kept_from + k, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        valid = tile.valid_lanes(c, end, lane_n, lane_p, n0, p0, N, P)
        body.store_output(
            xs[k].to(ACC), residuals[k], mean, scale, shift, leak, y_ptr, residual_ptr, mask_ptr,
            n0 * s_n + p0 * s_p, lane, valid, c0, n0, p0, N, end, P,
            ACT, GATE, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, ONCE,
        )  # fmt: skip
    for i in tl.range(first, kept_from, num_stages=STAGES):
        chunk = first + kept_from - 1 - i
        n0, p0 = tile.chunk_origin(chunk, P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
        _columns, exist = tile.existing(c, end, lane_n, lane_p, n0, p0, N, P, WHOLE, EVEN)
        dense = n0 * s_n + p0 * s_p
        x = tl.load(x_ptr + (n0 * x_n + p0 * x_p) + x_lane, mask=exist, other=0.0,
            eviction_policy=ONCE)  # fmt: skip
        residual = body.load_residual(residual_ptr, x, dense, lane, exist, ONCE)
        body.store_output(
            x.to(ACC), residual, mean, scale, shift, leak, y_ptr, residual_ptr, mask_ptr,
            dense, lane, exist, c0, n0, p0, N, end, P,
            ACT, GATE, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, ONCE,
        )  # fmt: skip
    if split == 0:
        moments.store_statistics(
            once_each, mean, m2, rstd, count, channels, mean_ptr, rstd_ptr,
            running_mean_ptr, running_var_ptr, counter_ptr if CUMULATIVE else None,
            momentum, CUMULATIVE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["OWN", "CHUNKS", "GROUPS"])
def forward_kernel(
    x_ptr,  # [N, C, P] input
    y_ptr,  # [N, C, P] output, dense
    residual_ptr,  # [N, C, P] dense, or None
    mask_ptr,  # bit mask of the gate, or None
    partial_ptr,  # [ROUNDS, 4, SPLITS, slots * BLOCK_C] moments of each program, workspace
    semaphore_ptr,  # [slots] int32; [2, slots] with OVERLAP
    mean_ptr,  # [C] out
    rstd_ptr,  # [C] out
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    slope_ptr,  # [C] or [1] learned slope of a prelu, or None
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
    OWN,  # chunks of a program
    CHUNKS,  # of a channel block
    GROUPS,  # of channel blocks, one after the other
    ONCE: tl.constexpr,  # eviction policy of what is not accessed again
    OVERLAP: tl.constexpr,  # the first pass over the next group comes before the second over this
    KEPT: tl.constexpr,  # last chunks of a program, which stay in its registers unless OVERLAP
    STAGES: tl.constexpr,  # of the others, chunks that are on their way or worked on
    WHOLE: tl.constexpr,  # all columns of those exist
    EVEN: tl.constexpr,  # and all of their channels
    SPLITS: tl.constexpr,  # programs that share a channel block
    CUMULATIVE: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation; of a learned slope `load_leak`'s STEP
    B: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PLANE: tl.constexpr,  # columns of a channel, where C counts columns (`Problem.flat`)
    WIDTH: tl.constexpr,  # channels of a block
):
    """Statistics, running statistics, normalize, add, activate."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    ROUNDS: tl.constexpr = 4 if OVERLAP else 2
    C, P = tile.hint_fast_axis(C, P, VEC, CHANNELS_LAST)
    slot = tl.program_id(0)
    leader = tl.program_id(1) == 0
    semaphore_ptr += slot
    if OVERLAP:
        # A program that has arrived for one group goes on to the next: two semaphores in turn, and
        # four rounds of workspace, as it may be three groups ahead of what another reads.
        before = tl.full([], 0, tl.int32)
        for turn in range(GROUPS + 1):
            arrived = before
            if turn < GROUPS:
                _moments_of_block(
                    x_ptr, partial_ptr, turn, N, C, P, xs_n, xs_c, xs_p, OWN, CHUNKS, "", ROUNDS,
                    KEPT, STAGES, WHOLE, EVEN, SPLITS, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST,
                    PLANE, WIDTH, VEC, ACC,
                )  # fmt: skip
                arrived = barrier.arrive(
                    semaphore_ptr + turn % 2 * tl.num_programs(0), leader, SPLITS
                )
            if turn > 0:
                barrier.wait(semaphore_ptr + (turn - 1) % 2 * tl.num_programs(0), before)
                _output_of_block(
                    (), turn - 1, x_ptr, y_ptr, residual_ptr, mask_ptr, partial_ptr, mean_ptr,
                    rstd_ptr, weight_ptr, bias_ptr, slope_ptr, running_mean_ptr, running_var_ptr,
                    counter_ptr, eps, momentum, N, C, P, xs_n, xs_c, xs_p, OWN, CHUNKS, ONCE,
                    ROUNDS, OVERLAP, KEPT, STAGES, WHOLE, EVEN, SPLITS, CUMULATIVE, ACT,
                    GATE, A, B, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, PLANE, WIDTH, VEC, ACC,
                )  # fmt: skip
            before = arrived
    else:
        # Two rounds of workspace: a program may be one meeting ahead of another.
        for group in range(GROUPS):
            xs = _moments_of_block(
                x_ptr, partial_ptr, group, N, C, P, xs_n, xs_c, xs_p, OWN, CHUNKS, ONCE, ROUNDS,
                KEPT, STAGES, WHOLE, EVEN, SPLITS, BLOCK_C, BLOCK_N, BLOCK_P, CHANNELS_LAST, PLANE,
                WIDTH, VEC, ACC,
            )  # fmt: skip
            barrier.meet(semaphore_ptr, leader, SPLITS)
            _output_of_block(
                xs, group, x_ptr, y_ptr, residual_ptr, mask_ptr, partial_ptr, mean_ptr, rstd_ptr,
                weight_ptr, bias_ptr, slope_ptr, running_mean_ptr, running_var_ptr, counter_ptr,
                eps, momentum, N, C, P, xs_n, xs_c, xs_p, OWN, CHUNKS, ONCE, ROUNDS, OVERLAP, KEPT,
                STAGES, WHOLE, EVEN, SPLITS, CUMULATIVE, ACT, GATE, A, B, BLOCK_C, BLOCK_N,
                BLOCK_P, CHANNELS_LAST, PLANE, WIDTH, VEC, ACC,
            )  # fmt: skip
    if counter_ptr is not None:
        if not CUMULATIVE:
            if (slot == 0) & leader:
                tl.store(counter_ptr, tl.load(counter_ptr) + 1)
