"""Memory of a GPU that stays allocated: tables, and the semaphores of programs that meet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from triton.runtime import driver

from .launch import is_rehearsing

T = TypeVar("T")


def lasting(device: torch.device, make: Callable[[], T]) -> T:
    """What ``make`` makes, in memory that may outlast the step.

    ``torch.compile(mode="reduce-overhead")`` first runs a step with everything that its thread
    allocates taken from the memory of a graph to come. What is alive after it and is no result is
    an error there, or, unchecked, overwritten (`torch/_inductor/cudagraph_trees.py`). A thread of
    its own allocates from the ordinary memory, under no mode of the caller's, on the default
    stream. What it starts there is done before this returns.
    """
    if device.type != "cuda":
        return make()

    def elsewhere() -> T:
        with torch.cuda.device(device):
            made = make()
            torch.cuda.current_stream().synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(elsewhere).result()


class Semaphores:
    """Zeros, or what complete launches left there, which is as good (see `_barrier`).

    Two launches that run at the same time must not share them. Launches on one stream follow each
    other, so each stream has its own. A captured launch may be replayed on any stream, so each has
    its own too: nothing needs to be set to zero in a replay.
    """

    MOST = 2048  # of one launch
    SLAB = 1 << 17  # allocated together: for 64 streams or as many captured launches, half a MB
    ALIGN = 32  # a cache line of 128 bytes is not shared

    def __init__(self) -> None:
        self._of_stream: dict[tuple[int, int], Tensor] = {}  # by device and stream
        self._left: dict[int, Tensor] = {}  # by device: what nobody has yet
        self._lock = threading.Lock()

    def of(self, x: Tensor, count: int) -> Tensor:
        """Int32 ``[count]`` or more, for a launch with the input ``x`` on the current stream.

        A launch that is not made may have an input without values; nothing of it is kept.
        """
        if not x.is_cuda or is_rehearsing():
            return torch.zeros(count, dtype=torch.int32, device=x.device)
        device = x.get_device()
        if torch.cuda.is_current_stream_capturing():
            return self._taken(x.device, device, count, may_allocate=False)
        key = (device, current_stream(device))
        found = self._of_stream.get(key)
        if found is None:
            found = self._of_stream[key] = self._taken(x.device, device, self.MOST, True)
        return found

    def _taken(self, where: torch.device, device: int, count: int, may_allocate: bool) -> Tensor:
        """Semaphores that nobody else has. A capture cannot allocate memory that outlasts it:
        where no launch came before, it gets some of its own, which each replay sets to zero."""
        room = -(-count // self.ALIGN) * self.ALIGN
        with self._lock:
            left = self._left.get(device)
            if left is None or left.numel() < room:
                if not may_allocate:
                    return torch.zeros(count, dtype=torch.int32, device=where)
                left = lasting(
                    where, lambda: torch.zeros(self.SLAB, dtype=torch.int32, device=where)
                )
            self._left[device] = left[room:]
            return left[:count]


def current_stream(device: int) -> int:
    """The stream of a GPU that launches go to. PyTorch's own function makes an object of it first,
    which costs the host more than a launch."""
    stream: int = driver.active.get_current_stream(device)
    return stream
