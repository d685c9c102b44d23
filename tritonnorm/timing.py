"""The one timer: variants of the same work in turn, in random order, and the median.

`interleaved` decides what runs when and is the same everywhere; a clock measures one run.
`HostClock` is for work that is done when the call returns. `GpuClock` puts the work into a CUDA
graph, so that the host's time per launch does not count, and measures with events.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["Clock", "GpuClock", "HostClock", "Timing", "interleaved"]

Call = Callable[[], Any]
LEAST_ROUNDS = 5  # the fewest of which a median and two quantiles say something


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile over the rounds."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """From the seconds of every round, of which there must be at least one."""
        if not seconds:
            raise ValueError("seconds: expected at least one round, got none")
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), fifths[0], fifths[-1], len(seconds))


class Clock(Protocol):
    """Measures one run of a variant."""

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        """Warm up. What comes back runs every call once and returns the seconds per call."""


class HostClock:
    """Wall time of the host, for work on the CPU. ``warm_up`` runs come first, unmeasured."""

    def __init__(self, warm_up: int = 2) -> None:
        self.warm_up = warm_up

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        for _ in range(self.warm_up):
            measure()
        return measure


class GpuClock:
    """Time between two CUDA events around a CUDA graph that holds all calls ``repeats`` times.

    Give calls that work on different tensors, together four times the last-level cache or more:
    then each finds its data in DRAM, as a layer in a network does.
    """

    def __init__(self, repeats: int = 4) -> None:
        self.repeats = repeats

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile kernels and fill the allocator before the capture
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.repeats):
                for call in calls:
                    call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def measure() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3 / (self.repeats * len(calls))

        for _ in range(3):
            measure()
        return measure


def interleaved(
    variants: Mapping[str, Sequence[Call]],
    clock: Clock,
    rounds: int = 15,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    budget: float | None = None,
) -> dict[str, Timing]:
    """Time variants against each other.

    Every round runs each variant once, in an order drawn anew, so that a slow spell of the machine
    meets all of them alike.

    Args:
        variants: name -> the calls of one run; several calls share the time of a run evenly.
        clock: what measures a run.
        rounds: how often each variant runs.
        seed: of the order.
        progress: called as ``progress(done, rounds)`` after each round.
        budget: seconds of wall time after which no round begins, if `LEAST_ROUNDS` are done.

    Returns:
        Name -> seconds per call.

    Raises:
        ValueError: no variants, no calls, or no rounds.
    """
    if not variants or not all(variants.values()):
        raise ValueError("variants: expected at least one, each with at least one call")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    measures = {name: clock.prepare(calls) for name, calls in variants.items()}
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    end = time.monotonic() + (float("inf") if budget is None else budget)
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.monotonic() >= end:
            break
        for name in order.sample(list(measures), len(measures)):
            seconds[name].append(measures[name]())
        if progress is not None:
            progress(done + 1, rounds)
    return {name: Timing.of(values) for name, values in seconds.items()}
