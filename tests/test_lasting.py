"""Memory that stays: whose it is, and that nobody keeps what has no values."""

from __future__ import annotations

import threading
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tritonnorm
from tritonnorm import device, observe, ops
from tritonnorm.device import KNOWN
from tritonnorm.kernels import lasting, persistent
from tritonnorm.kernels.lasting import Semaphores
from tritonnorm.kernels.launch import launches_to

CPU = torch.device("cpu")


class GPU:
    """Where a launch takes place, as far as semaphores ask: they lie on the CPU here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.stream, self.capturing = 1, 7, False
        self.asked_by: list[int] = []
        monkeypatch.setattr(lasting, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        self.semaphores = Semaphores()

    def found(self, count: int = 2000) -> torch.Tensor:
        x: Any = SimpleNamespace(is_cuda=True, device=CPU, get_device=lambda: self.device)
        return self.semaphores.of(x, count)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GPU:
    return GPU(monkeypatch)


def apart(*tensors: torch.Tensor) -> bool:
    """Whether no two of them share a cache line; a GPU's allocations begin with one."""
    lines = sorted(
        (t.untyped_storage().data_ptr(), first // 32, (first + t.numel() - 1) // 32)
        for t in tensors
        for first in [t.storage_offset()]
    )
    return all(
        (slab, end) < (other, start) for (slab, _, end), (other, start, _) in pairwise(lines)
    )


def test_launches_that_may_overlap_have_semaphores_of_their_own(gpu: GPU) -> None:
    """Those of a GPU and stream, which stay; and of each captured launch."""
    first = gpu.found()
    assert first.numel() >= 2000 and not first.any() and first.data_ptr() % 16 == 0
    assert gpu.found() is first and gpu.found(3) is first
    gpu.stream = 8
    second = gpu.found()
    gpu.device = 2
    third = gpu.found()
    gpu.device, gpu.capturing = 1, True
    captured = [gpu.found(5), gpu.found(40), gpu.found(5)]
    assert [t.numel() for t in captured] == [5, 40, 5] and not any(t.any() for t in captured)
    assert apart(first, second, third, *captured)
    gpu.stream, gpu.capturing = 7, False
    assert gpu.found() is first


def test_a_capture_allocates_nothing_that_stays(gpu: GPU) -> None:
    gpu.capturing = True
    assert gpu.found(5).numel() == 5 and not gpu.semaphores._left  # no launch before it
    gpu.capturing = False
    gpu.found()
    gpu.capturing = True
    left = gpu.semaphores._left[1].numel()
    for _ in range(left // 2016):  # 2000 and the rest of a cache line
        gpu.found()
    assert gpu.semaphores._left[1].numel() < 2016
    own = gpu.found()
    assert own.numel() == 2000 and own.untyped_storage().nbytes() == 8000


def test_a_new_stream_may_need_a_new_slab(gpu: GPU) -> None:
    seen = []
    for gpu.stream in range(2 * Semaphores.SLAB // Semaphores.MOST):
        seen.append(gpu.found())
    assert apart(*seen) and len({t.untyped_storage().data_ptr() for t in seen}) == 2


def test_what_stays_is_allocated_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is there when the caller gets it; an error arrives, too."""
    seen: list[Any] = []
    here = threading.get_ident()

    class Entered:
        def __init__(self, device: torch.device) -> None:
            seen.append(device.index)

        def __enter__(self) -> None:
            seen.append("entered")

        def __exit__(self, *_: object) -> None:
            seen.append("left")

    def make() -> int:
        seen.append(threading.get_ident() != here)
        return 3

    stream = SimpleNamespace(synchronize=lambda: seen.append("done"))
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    assert lasting.lasting(torch.device("cuda", 2), make) == 3
    assert seen == [2, "entered", True, "done", "left"]
    with pytest.raises(ZeroDivisionError):
        lasting.lasting(torch.device("cuda", 2), lambda: 1 // 0)
    assert lasting.lasting(CPU, threading.get_ident) == here


def test_nothing_without_values_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal on a GPU has tensors that say they lie there, and no memory."""
    where, fake = torch.device("cuda", 0), FakeTensorMode()
    monkeypatch.setitem(device._described, where, KNOWN["h200"])
    monkeypatch.setattr(lasting, "current_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    semaphores = Semaphores()
    monkeypatch.setattr(persistent, "_semaphores", semaphores)
    with fake:
        x = torch.empty(64, 56, 56, 256, device=where, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        vectors = (torch.empty(256, device=where) for _ in range(4))
        counter = torch.empty((), device=where, dtype=torch.int64)
        args = (x, None, *vectors, counter, 0.1, 1e-5, "relu", (), False)
    assert x.is_cuda
    ((launch, _),) = observe._rehearsed(ops._training, args, fake)
    assert launch.parts("cuda")[2]["launch_cooperative_grid"]
    assert not semaphores._of_stream and not semaphores._left


def test_a_rehearsal_keeps_launches_of_its_own_thread_only() -> None:
    x, bn, other = torch.randn(4, 3, 5, 5), tritonnorm.BatchNorm2d(3), tritonnorm.BatchNorm2d(3)
    expected, found, swallowed = other(x), [], []
    with launches_to(lambda launch, tensors: swallowed.append(launch)):
        thread = threading.Thread(target=lambda: found.append(bn(x)))
        thread.start()
        thread.join()
        with launches_to(lambda launch, tensors: swallowed.append("inner")):
            bn(x)
        bn(x)
    assert torch.equal(found[0], expected)
    assert swallowed[0] == "inner" and swallowed[-1] != "inner"
    assert torch.equal(bn.eval()(x), bn.eval()(x)) and bn.num_batches_tracked == 1
