"""Grid barriers run under random interleavings, and deadlocks end with an error."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bench.lab.scheduler import interleaved


@triton.jit
def normalize_kernel(x_ptr, part_ptr, count_ptr, o_ptr, n, WAIT: tl.constexpr, B: tl.constexpr):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    i = pid * B + tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(part_ptr + pid, tl.sum(x, 0))
    tl.atomic_add(count_ptr, 1, sem="acq_rel")
    if WAIT:
        while tl.atomic_add(count_ptr, 0, sem="acquire") < programs:
            pass
    total = tl.zeros((), tl.float32)
    for k in range(programs):
        total += tl.load(part_ptr + k)
    tl.store(o_ptr + i, x / total, mask=i < n)


@triton.jit
def last_of_kernel(count_ptr, o_ptr, P: tl.constexpr):
    if tl.atomic_add(count_ptr, 1, sem="acq_rel") == P - 1:
        tl.store(o_ptr, tl.program_id(0) * 10 + tl.program_id(1))


@triton.jit
def lock_kernel(lock_ptr, o_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(o_ptr, tl.load(o_ptr) + 1)
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def failing_kernel(count_ptr):
    tl.atomic_add(count_ptr, 1)
    tl.device_assert(tl.program_id(0) != 2, "program 2 fails")


def counter(value: int = 0) -> torch.Tensor:
    return torch.full((1,), value, dtype=torch.int32)


def normalize(x: torch.Tensor, start: int = 0, wait: bool = True) -> torch.Tensor:
    o = torch.full_like(x, float("nan"))
    part = torch.full((4,), float("nan"))
    normalize_kernel[(4,)](x, part, counter(start), o, x.numel(), WAIT=wait, B=256)
    return o


@pytest.mark.parametrize("seed", range(8))
def test_grid_barrier(seed):
    x = torch.rand(1000)
    with interleaved(seed):
        torch.testing.assert_close(normalize(x), x / x.sum())


def test_a_missing_barrier_is_seen():
    x = torch.rand(1000)
    with interleaved(0):
        assert normalize(x, wait=False).isnan().any()


def test_deadlock_becomes_timeout_error():
    x = torch.rand(1000)
    with (
        pytest.raises(TimeoutError, match=r"normalize_kernel: 4 .* 500 atomic steps"),
        interleaved(0, limit=500),
    ):
        normalize(x, start=-1)
    with pytest.raises(TimeoutError), interleaved(0, limit=5):
        normalize(x)
    with interleaved(0, limit=500):  # the limit is per launch
        for _ in range(20):
            normalize(x)


def run_last_of(seed: int) -> int:
    out = counter(-1)
    with interleaved(seed):
        last_of_kernel[(3, 2)](counter(), out, P=6)
    return int(out.item())


def test_the_order_varies_with_the_seed_and_only_with_it():
    last = [run_last_of(seed) for seed in range(12)]
    assert len(set(last)) > 2
    assert last == [run_last_of(seed) for seed in range(12)]


def test_spin_lock():
    total = counter()
    with interleaved(3):
        lock_kernel[(8,)](counter(), total)
    assert total.item() == 8


def test_an_error_in_one_program_is_raised():
    with pytest.raises(Exception, match="program 2 fails"), interleaved(1):
        failing_kernel[(4,)](counter())


def test_normal_order_afterwards():
    with interleaved(1):
        pass
    out = counter(-1)
    last_of_kernel[(3, 2)](counter(), out, P=6)
    assert out.item() == 21
