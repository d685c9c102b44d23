"""Time of whole models: a clock for work that the host launches, CUDA graphs, parts of a step."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["EventClock", "Laps", "captured"]


class EventClock:
    """Time between two CUDA events around calls that the host launches one by one.

    So where the host is slower than the GPU, its time is in it, as it is in a training loop. A
    `tritonnorm.timing.Clock`.

    Attributes:
        warm_up: runs that come first, unmeasured.
    """

    def __init__(self, warm_up: int = 3) -> None:
        self.warm_up = warm_up

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def measure() -> float:
            start.record()
            for call in calls:
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3 / len(calls)

        for _ in range(self.warm_up):
            measure()
        return measure


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a call, as a function that replays it and returns the call's own result.

    The call must work on the same tensors every time, and a backward pass in it must find all
    gradients at None, so that it allocates them inside the graph.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is allocated, compiled or chosen once must not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


class Laps:
    """Points in time within runs, and the medians of what lies between them.

    On a GPU the points are events: they lie on the GPU's own timeline, and are read when all is
    done.

    Args:
        device: "cpu" or "cuda".
        now: the host's clock, in seconds.
    """

    def __init__(self, device: str, now: Callable[[], float] = time.perf_counter) -> None:
        self._on_gpu = device != "cpu"
        self._now = now
        self._runs: list[list[Any]] = []

    def start(self) -> None:
        """A new run begins here."""
        self._runs.append([self._point()])

    def mark(self) -> None:
        """A part ends here, and the next one begins."""
        self._runs[-1].append(self._point())

    def medians(self, last: int) -> list[float]:
        """Seconds of each part, over the last so many runs: those before were warm-up."""
        if self._on_gpu:
            torch.cuda.synchronize()
        parts = zip(*map(self._lengths, self._runs[-last:]), strict=True)
        return [statistics.median(part) for part in parts]

    def _point(self) -> Any:
        if not self._on_gpu:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _lengths(self, run: list[Any]) -> list[float]:
        pairs = itertools.pairwise(run)
        if self._on_gpu:
            return [float(a.elapsed_time(b)) * 1e-3 for a, b in pairs]
        return [b - a for a, b in pairs]
