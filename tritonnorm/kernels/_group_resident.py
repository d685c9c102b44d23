"""The kernels of `group_resident`: a program holds what it normalizes in its registers."""

import triton
import triton.language as tl

from . import _groups as groups


@triton.jit
def place(
    block,
    step,
    G,
    K,
    C,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PER: tl.constexpr,
):
    """First sample, channel and position of a program, and the end of its channels."""
    zero = block * 0
    if PER == groups.POSITION:
        return zero, zero, step * BLOCK_P, C
    elif PER == groups.GROUP:
        return step, block * K, zero, block * K + K
    else:
        return step, block * BLOCK_C, zero, C


@triton.jit
def forward_kernel(
    x_ptr,  # [N, C, P] input
    y_ptr,  # [N, C, P] output, dense
    residual_ptr,  # [N, C, P] dense, or None
    mean_ptr,  # [statistics] out; None where not CENTRED
    rstd_ptr,  # [statistics] out
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    eps: tl.float64,
    G,
    K,
    P,
    xs_n,
    xs_c,
    xs_p,
    BLOCKS,  # programs that share a sample
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    CHUNKS_C: tl.constexpr,
    CHUNKS_P: tl.constexpr,
    PER: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Statistics, normalize, add, activate, for one group, or a block of rows or channels."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    C, K, P = groups.extents(G, K, P, VEC, CHANNELS_LAST, PER == groups.GROUP)
    some = C + P > 0  # see `moments.settled`
    block, step = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    n, c_first, p_first, c_end = place(block, step, G, K, C, BLOCK_C, BLOCK_P, PER)
    s_n, s_c, s_p, lane, x_n, x_c, x_p, x_lane = groups.frame(
        C, P, xs_n, xs_c, xs_p, BLOCK_C, BLOCK_P, CHANNELS_LAST
    )
    xs = ()
    for i in tl.static_range(CHUNKS_C):
        for j in tl.static_range(CHUNKS_P):
            c0, p0 = c_first + i * BLOCK_C, p_first + j * BLOCK_P
            _, _, valid = groups.lanes(c0, c_end, p0, P, BLOCK_C, BLOCK_P)
            x_at = n * x_n + c0 * x_c + p0 * x_p + x_lane
            xs = xs + (tl.load(x_ptr + x_at, mask=valid, other=0.0),)
    count = groups.size_of(C, K, P, ACC, PER)
    sums = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    if CENTRED:
        for i in tl.static_range(CHUNKS_C * CHUNKS_P):
            sums += xs[i].to(ACC)
    mean = groups.total(sums, some, PER) / count
    squares = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for i in tl.static_range(CHUNKS_C):
        for j in tl.static_range(CHUNKS_P):
            c0, p0 = c_first + i * BLOCK_C, p_first + j * BLOCK_P
            _, _, valid = groups.lanes(c0, c_end, p0, P, BLOCK_C, BLOCK_P)
            centred = tl.where(valid, xs[i * CHUNKS_P + j].to(ACC) - mean, 0.0)
            squares += centred * centred
    m2 = groups.total(squares, some, PER)
    rstd = 1.0 / tl.sqrt(m2 / count + tl.full([], eps, ACC))
    c, p, _ = groups.lanes(c_first, c_end, p_first, P, BLOCK_C, BLOCK_P)
    at, there = groups.statistic_index(n, c, c_end, p, G, K, P, PER)
    if mean_ptr is not None:
        tl.store(mean_ptr + at, mean, mask=there)
    tl.store(rstd_ptr + at, rstd, mask=there)
    for i in tl.static_range(CHUNKS_C):
        c0 = c_first + i * BLOCK_C
        c, _, _ = groups.lanes(c0, c_end, p_first, P, BLOCK_C, BLOCK_P)
        weight, bias = groups.load_affine(c, c_end, weight_ptr, bias_ptr, ACC)
        for j in tl.static_range(CHUNKS_P):
            p0 = p_first + j * BLOCK_P
            _, _, valid = groups.lanes(c0, c_end, p0, P, BLOCK_C, BLOCK_P)
            groups.store_output(
                xs[i * CHUNKS_P + j].to(ACC), mean, rstd, weight, bias, y_ptr, residual_ptr,
                n * s_n + c0 * s_c + p0 * s_p + lane, valid, CENTRED, ACT, A, B,
            )  # fmt: skip


@triton.jit(do_not_specialize=["STEPS", "PER_PART"])
def backward_kernel(
    dy_ptr,  # [N, C, P] dense
    x_ptr,  # [N, C, P]
    residual_ptr,  # [N, C, P] dense, or None
    dx_ptr,  # [N, C, P] dense, or None
    dresidual_ptr,  # [N, C, P] dense, or None
    mean_ptr,  # [statistics]; None where not CENTRED
    rstd_ptr,  # [statistics]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    partial_ptr,  # [2, PARTS, C] sums of g and of g * normalized x, out, or None
    G,
    K,
    P,
    xs_n,
    xs_c,
    xs_p,
    BLOCKS,  # programs that share a step
    STEPS,  # samples, or blocks of rows
    PER_PART,  # steps of a program
    CENTRED: tl.constexpr,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,  # parameters of the activation
    B: tl.constexpr,
    CHUNKS_C: tl.constexpr,
    CHUNKS_P: tl.constexpr,
    PER: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """All gradients of the groups that a program walks over; x and g of one stay in registers."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    C, K, P = groups.extents(G, K, P, VEC, CHANNELS_LAST, PER == groups.GROUP)
    some = C + P > 0  # see `moments.settled`
    block, part = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    plane = tl.cast(tl.cdiv(STEPS, PER_PART), tl.int64) * C
    s_n, s_c, s_p, lane, x_n, x_c, x_p, x_lane = groups.frame(
        C, P, xs_n, xs_c, xs_p, BLOCK_C, BLOCK_P, CHANNELS_LAST
    )
    count = groups.size_of(C, K, P, ACC, PER)
    LANES: tl.constexpr = BLOCK_P if PER == groups.POSITION else 1
    part_g = tl.zeros([BLOCK_C, LANES], ACC)
    part_gn = tl.zeros([BLOCK_C, LANES], ACC)
    for step in range(part * PER_PART, tl.minimum(part * PER_PART + PER_PART, STEPS)):
        n, c_first, p_first, c_end = place(block, step, G, K, C, BLOCK_C, BLOCK_P, PER)
        c, p, _ = groups.lanes(c_first, c_end, p_first, P, BLOCK_C, BLOCK_P)
        at, there = groups.statistic_index(n, c, c_end, p, G, K, P, PER)
        rstd = tl.load(rstd_ptr + at, mask=there, other=0.0)
        mean = rstd
        if CENTRED:
            mean = tl.load(mean_ptr + at, mask=there, other=0.0)
        xs = ()
        gs = ()
        step_g = tl.zeros([BLOCK_C, LANES], ACC)  # weighted
        step_gn = tl.zeros([BLOCK_C, LANES], ACC)
        for i in tl.static_range(CHUNKS_C):
            c0 = c_first + i * BLOCK_C
            c, _, _ = groups.lanes(c0, c_end, p_first, P, BLOCK_C, BLOCK_P)
            weight, bias = groups.load_affine(c, c_end, weight_ptr, bias_ptr, ACC)
            of_g = tl.zeros([BLOCK_C, LANES], ACC)
            of_gn = tl.zeros([BLOCK_C, LANES], ACC)
            for j in tl.static_range(CHUNKS_P):
                p0 = p_first + j * BLOCK_P
                _, _, valid = groups.lanes(c0, c_end, p0, P, BLOCK_C, BLOCK_P)
                x_at = n * x_n + c0 * x_c + p0 * x_p + x_lane
                raw = tl.load(x_ptr + x_at, mask=valid, other=0.0)
                normal = groups.normalized(raw.to(ACC), mean, rstd, CENTRED)
                g = groups.load_gradient(
                    normal, weight, bias, dy_ptr, residual_ptr, dresidual_ptr,
                    n * s_n + c0 * s_c + p0 * s_p + lane, valid, GRADIENT, GATE, GATED, A, B,
                )  # fmt: skip
                # A tile of sums beside what is kept would spill.
                of_g += groups.over_positions(g, some, PER)
                of_gn += groups.over_positions(g * normal, some, PER)
                if dx_ptr is not None:
                    xs = xs + (raw,)
                    gs = gs + (g,)
            step_g += of_g * weight
            step_gn += of_gn * weight
            if partial_ptr is not None:
                if CHUNKS_C == 1:
                    part_g += of_g
                    part_gn += of_gn
                else:  # one step a program
                    row = partial_ptr + tl.cast(part, tl.int64) * C + c
                    tl.store(row, tl.sum(of_g, 1, keep_dims=True), mask=c < c_end)
                    tl.store(row + plane, tl.sum(of_gn, 1, keep_dims=True), mask=c < c_end)
        if dx_ptr is not None:
            mean_g = groups.total(step_g, some, PER) / count
            slope = groups.total(step_gn, some, PER) / count
            for i in tl.static_range(CHUNKS_C):
                c0 = c_first + i * BLOCK_C
                c, _, _ = groups.lanes(c0, c_end, p_first, P, BLOCK_C, BLOCK_P)
                weight, _ = groups.load_affine(c, c_end, weight_ptr, None, ACC)
                for j in tl.static_range(CHUNKS_P):
                    p0 = p_first + j * BLOCK_P
                    _, _, valid = groups.lanes(c0, c_end, p0, P, BLOCK_C, BLOCK_P)
                    x = xs[i * CHUNKS_P + j].to(ACC)
                    normal = groups.normalized(x, mean, rstd, CENTRED)
                    dx = groups.input_gradient(
                        gs[i * CHUNKS_P + j], normal, weight, rstd, mean_g, slope, CENTRED
                    )
                    at = n * s_n + c0 * s_c + p0 * s_p + lane
                    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=valid)
    if CHUNKS_C == 1:
        if partial_ptr is not None:
            _, c_first, _, c_end = place(block, part, G, K, C, BLOCK_C, BLOCK_P, PER)
            c = c_first + tl.arange(0, BLOCK_C)[:, None]
            row = partial_ptr + tl.cast(part, tl.int64) * C + c
            tl.store(row, tl.sum(part_g, 1, keep_dims=True), mask=c < c_end)
            tl.store(row + plane, tl.sum(part_gn, 1, keep_dims=True), mask=c < c_end)
