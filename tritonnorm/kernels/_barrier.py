"""Programs of one launch meet: what each stored before, all can load after.

All of them must be resident at once, so the launch is cooperative. The semaphore needs no reset:
one program adds 2^31 - (programs - 1) and the others 1, so that every meeting flips the top bit and
leaves the rest as it was (the barrier of CUDA's cooperative groups).
"""

import triton
import triton.language as tl


@triton.jit
def meet(semaphore_ptr, leader, programs):
    """Wait until all programs that share a semaphore are here.

    semaphore_ptr  # [] int32; leader: true in one of them; programs: how many, at least 2
    """
    wait(semaphore_ptr, arrive(semaphore_ptr, leader, programs))


@triton.jit
def arrive(semaphore_ptr, leader, programs):
    """Tell the others that this program is here, and go on; what comes back is for `wait`, which
    has to come before the next `arrive` at the same semaphore."""
    tl.debug_barrier()  # what the threads of this program stored comes before its arrival
    step = tl.where(leader, 2147483647 - (programs - 2), 1)
    return tl.atomic_add(semaphore_ptr, step, sem="acq_rel", scope="gpu")


@triton.jit
def wait(semaphore_ptr, before):
    """Wait until all programs have arrived; `before` is what `arrive` returned."""
    now = before
    while ((now ^ before) & -2147483648) == 0:
        now = tl.atomic_add(semaphore_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def rows(at, stride, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """What ROWS programs stored before they met, [next power of 2, BLOCK_C] with zeros behind them.

    at  # [BLOCK_C] pointers to the first row; stride: elements from one row to the next. Loads that
    pass the L1 cache, which is not kept in step with other multiprocessors.
    """
    r = tl.arange(0, triton.next_power_of_2(ROWS))
    valid = tl.broadcast_to((r < ROWS)[:, None], [triton.next_power_of_2(ROWS), BLOCK_C])
    pointers = at[None, :] + r[:, None] * stride
    return tl.load(pointers, mask=valid, other=0.0, cache_modifier=".cg")
