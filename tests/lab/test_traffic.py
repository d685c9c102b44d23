"""The traffic trace counts exactly, stops stray accesses and finds races."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bench.lab.scheduler import interleaved
from bench.lab.traffic import OutOfBoundsError, RaceError, trace


@triton.jit
def add_kernel(x_ptrs, r_ptr, o_ptr, n, EXTRA: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n + EXTRA
    v = tl.load(x_ptrs[0] + i, mask=m, other=0.0) + tl.load(x_ptrs[1] + i, mask=m, other=0.0)
    if r_ptr is not None:
        v += tl.load(r_ptr + i, mask=m, other=0.0)
    tl.store(o_ptr + i, v, mask=m)


@triton.jit
def load_at(pointer, i):
    return tl.load(pointer + i)


@triton.jit
def walk_kernel(x_ptr, o_ptr, stride, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o_ptr + i, load_at(x_ptr, i * stride))


@triton.jit
def same_place_kernel(o_ptr):
    tl.store(o_ptr, tl.program_id(0))


@triton.jit
def count_kernel(c_ptr, o_ptr):
    tl.atomic_add(c_ptr, 1)
    if tl.program_id(0) == 1:
        tl.store(o_ptr, tl.load(c_ptr))


@triton.jit
def shift_kernel(x_ptr):
    i = tl.program_id(0)
    tl.store(x_ptr + i, tl.load(x_ptr + i + 1))


@triton.jit
def last_block_kernel(
    x_ptr, part_ptr, count_ptr, o_ptr, SEM: tl.constexpr, SCOPE: tl.constexpr, P: tl.constexpr
):
    pid = tl.program_id(0)
    tl.store(part_ptr + pid, tl.load(x_ptr + pid))
    if tl.atomic_add(count_ptr, 1, sem=SEM, scope=SCOPE) == P - 1:
        tl.store(o_ptr, tl.sum(tl.load(part_ptr + tl.arange(0, P)), 0))


@triton.jit
def two_rounds_kernel(
    part_ptr, bar_ptr, o_ptr, SECOND: tl.constexpr, SEM: tl.constexpr, P: tl.constexpr
):
    pid = tl.program_id(0)
    tl.store(part_ptr + pid, pid)
    tl.atomic_add(bar_ptr, 1, sem=SEM)
    while tl.atomic_add(bar_ptr, 0, sem="acquire") < P:
        pass
    s = tl.sum(tl.load(part_ptr + tl.arange(0, P)), 0)
    if SECOND:
        tl.atomic_add(bar_ptr, 1, sem="release")
        while tl.atomic_add(bar_ptr, 0, sem="acquire") < 2 * P:
            pass
    tl.store(part_ptr + pid, s)
    tl.store(o_ptr + pid, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("residual", [False, True])
def test_exact_bytes_with_tuples_and_none(dtype, residual):
    n, size = 1000, dtype.itemsize
    a, b, r, o = (torch.randn(n).to(dtype) for _ in range(4))
    with trace() as t:
        add_kernel[(4,)]((a, b), r if residual else None, o, n, EXTRA=0, B=256)
    loads = 3 if residual else 2
    assert (t.loaded, t.stored, t.atomic) == (loads * n * size, n * size, 0)
    assert t.total == (loads + 1) * n * size
    (launch,) = t.launches
    assert launch.grid == (4, 1, 1)
    moved = dict.fromkeys(["x_ptrs[0]", "x_ptrs[1]"], (n * size, 0, 0))
    if residual:
        moved["r_ptr"] = (n * size, 0, 0)
    assert launch.arguments == {**moved, "o_ptr": (0, n * size, 0)}
    t.raise_on_race()


def test_sectors_show_a_strided_walk():
    x, o = torch.randn(64 * 40), torch.empty(64)
    with trace() as t:
        walk_kernel[(1,)](x, o, 40, B=64)
        walk_kernel[(1,)](x, o, 1, B=64)
    strided, dense = t.launches
    assert (strided.loaded, strided.load_sectors) == (256, 64 * 32)
    assert dense.load_sectors in (256, 288)  # one more when x is not aligned to 32 bytes
    assert t.load_sectors == strided.load_sectors + dense.load_sectors
    assert strided.store_sectors == dense.store_sectors


def test_many_launches_by_kernel():
    a, o = torch.randn(64), torch.empty(64)
    with trace() as t:
        for _ in range(3):
            add_kernel[(1,)]((a, a), None, o, 64, EXTRA=0, B=64)
        walk_kernel[lambda meta: (1,)](a, o, 1, B=64)
    summed = t.by_kernel()
    assert [x.kernel for x in t.launches] == ["add_kernel"] * 3 + ["walk_kernel"]
    assert {k: (v.loaded, v.stored) for k, v in summed.items()} == {
        "add_kernel": (3 * 512, 3 * 256),
        "walk_kernel": (256, 256),
    }
    assert (t.loaded, t.stored) == (3 * 512 + 256, 4 * 256)


def test_out_of_bounds_names_kernel_program_and_argument():
    base = torch.zeros(4, 1000)
    a, o = base[0, :900], base[1, :900]  # the bytes behind both belong to the same storage
    with (
        pytest.raises(
            OutOfBoundsError,
            match=r"add_kernel, program \(3, 0, 0\): load of 3 .*x_ptrs\[0\]\[900\]",
        ),
        trace() as t,
    ):
        add_kernel[(4,)]((a, a), None, o, 900, EXTRA=3, B=256)
    assert t.launches[0].kernel == "add_kernel"
    with pytest.raises(IndexError, match=r"walk_kernel.*x_ptr"), trace():  # from a device function
        walk_kernel[(1,)](a, o, -1, B=64)
    with trace():
        add_kernel[(4,)]((a, a), None, o, 900, EXTRA=0, B=256)


def test_store_out_of_bounds_is_stopped_before_it_happens():
    base = torch.zeros(2, 64)
    with pytest.raises(OutOfBoundsError, match="store of 32 elements"), trace():
        walk_kernel[(1,)](base[0], base[1, :32], 0, B=64)
    assert not base.any()


def test_races():
    with trace() as t:
        same_place_kernel[(4,)](torch.zeros(1, dtype=torch.int32))
    assert len(t.races) == 1 and t.races[0].kinds == ("store", "store")
    with pytest.raises(RaceError, match=r"same_place_kernel: o_ptr\[0\]: store by"):
        t.raise_on_race()
    with trace() as t:  # each program writes what its left neighbour reads
        shift_kernel[(4,)](torch.zeros(5))
    assert [r.element for r in t.races] == ["x_ptr[1]", "x_ptr[2]", "x_ptr[3]"]
    with trace() as t:  # a plain load among atomics
        count_kernel[(4,)](torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    assert [r.element for r in t.races] == ["c_ptr[0]"]
    with trace() as t:  # one program: nothing to race with
        same_place_kernel[(1,)](torch.zeros(1, dtype=torch.int32))
        same_place_kernel[(1,)](torch.zeros(1, dtype=torch.int32))
    assert not t.races


@pytest.mark.parametrize(
    ("sem", "scope", "races"),
    [
        ("acq_rel", "gpu", 0),
        ("relaxed", "gpu", 7),
        ("acquire", "gpu", 7),
        ("release", "gpu", 7),
        ("acq_rel", "cta", 7),
    ],
)
def test_last_block_needs_release_and_acquire(sem, scope, races):
    x, o = torch.rand(8), torch.zeros(1)
    count = torch.zeros(1, dtype=torch.int32)
    with trace() as t:
        last_block_kernel[(8,)](x, torch.zeros(8), count, o, SEM=sem, SCOPE=scope, P=8)
    torch.testing.assert_close(o[0], x.sum())
    assert len(t.races) == races
    assert t.atomic == 8 * 4


@pytest.mark.parametrize("seed", range(3))
def test_reused_buffer_needs_a_second_barrier(seed):
    def run(second: bool, sem: str = "release") -> list[str]:
        part, bar, o = (torch.zeros(n, dtype=torch.int32) for n in (4, 1, 4))
        with trace() as t, interleaved(seed):
            two_rounds_kernel[(4,)](part, bar, o, SECOND=second, SEM=sem, P=4)
        if second:
            assert o.tolist() == [6] * 4
        return [r.element for r in t.races]

    assert run(second=True) == []
    every = [f"part_ptr[{k}]" for k in range(4)]
    assert run(second=False) == every
    assert set(run(second=True, sem="relaxed")) & set(every)  # arriving without a release


def test_everything_is_put_back():
    from triton.runtime import interpreter as stock

    def state():
        b = stock.InterpreterBuilder
        return (
            b.create_masked_load,
            b.create_masked_store,
            b.create_atomic_rmw,
            b.create_atomic_cas,
            stock.GridExecutor._init_args_hst,
            stock.GridExecutor.__call__,
        )

    before = state()
    with pytest.raises(OutOfBoundsError), trace(), interleaved():
        walk_kernel[(1,)](torch.zeros(8), torch.zeros(8), 1, B=16)
    assert state() == before
