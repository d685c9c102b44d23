"""The one timer: variants of the same work in turn, in random order, and the median.

`interleaved` decides what runs when, and when it is enough, and is the same everywhere; a clock
measures one run. `HostClock` is for work that is done when the call returns. `GpuClock` puts the
work into a CUDA graph, so that the host's time per launch does not count, and measures with events.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["Clock", "GpuClock", "HostClock", "Quiet", "Timing", "in_turn", "interleaved"]

Call = Callable[[], Any]
SLEEP = 200_000  # clock cycles, 0.1 ms at 2 GHz: some ten times what the launch of a graph takes
LEAST_ROUNDS = 5  # the fewest of which a median and two quantiles say something


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile over the rounds.

    `noise` is the standard deviation over the mean, 0 for a single round.
    """

    median: float
    p20: float
    p80: float
    rounds: int
    noise: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """From the seconds of every round, of which there must be at least one."""
        if not seconds:
            raise ValueError("seconds: expected at least one round, got none")
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        median = statistics.median(seconds)
        return cls(median, fifths[0], fifths[-1], len(seconds), _noise(seconds))


def _noise(seconds: Sequence[float]) -> float:
    return statistics.stdev(seconds) / statistics.fmean(seconds)


@dataclass(frozen=True)
class Quiet:
    """When samples are enough: after NVIDIA's nvbench, whose limits of noise these are.

    nvbench also asks for half a second measured in sum, of samples that are one launch each. Here a
    sample is the mean over a run of many calls (see `GpuClock`), so their number is asked for.

    Attributes:
        least: the fewest samples.
        noise: enough once the standard deviation over the mean is below this,
        window, drift: or once that noise has come to rest: over so many samples its own standard
            deviation is below this fraction of its mean. More samples would not lower it.
    """

    least: int = 20
    noise: float = 0.005
    window: int = 64
    drift: float = 0.05

    def enough(self, samples: Sequence[float]) -> bool:
        """Whether no more samples are needed."""
        if len(samples) < max(self.least, 2):
            return False
        noises = self._noises(samples)
        if noises[-1] < self.noise:
            return True
        recent = noises[-self.window :]
        return len(noises) > self.window and (
            statistics.pstdev(recent) < self.drift * statistics.fmean(recent)
        )

    @staticmethod
    def _noises(samples: Sequence[float]) -> list[float]:
        """The noise of the first two samples, of the first three, ... (Welford 1962)."""
        noises, mean, squares = [], samples[0], 0.0
        for n, value in enumerate(samples[1:], start=2):
            off = value - mean
            mean += off / n
            squares += off * (value - mean)
            noises.append(math.sqrt(squares / (n - 1)) / mean)
        return noises


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
    """Time between two CUDA events around a CUDA graph that holds the calls, each several times.

    Give calls that work on different tensors, together four times the last-level cache or more:
    then each finds its data in DRAM, as a layer in a network does. What the calls return is kept
    until all of them have run, so that their outputs take turns in memory too.

    Warm-up and capture use one stream, on which a call may do its own set-up when it first runs: a
    backward pass must be captured on the stream of its forward.

    Attributes:
        least_seconds: the shortest run; shorter work is repeated inside the graph. Events resolve
            about half a microsecond (CUDA runtime API, cudaEventElapsedTime).
        warm_up_seconds: how long the graph is replayed before it is measured, for the clocks to
            rise.
    """

    MOST_NODES = 4096  # calls in one graph; more only make its capture slow

    def __init__(self, least_seconds: float = 200e-6, warm_up_seconds: float = 0.02) -> None:
        self.least_seconds = least_seconds
        self.warm_up_seconds = warm_up_seconds

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile kernels and fill the allocator before the capture
            for _ in range(3):
                kept = [call() for call in calls]
                del kept
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        measure = self._captured(calls, 1, stream)
        seconds = min(measure() for _ in range(3)) * len(calls)
        if seconds < self.least_seconds:
            most = max(1, self.MOST_NODES // len(calls))
            repeats = min(most, math.ceil(self.least_seconds / max(seconds, 1e-9)))
            measure = self._captured(calls, repeats, stream)
        end = time.monotonic() + self.warm_up_seconds
        while time.monotonic() < end:
            measure()
        return measure

    @staticmethod
    def _captured(
        calls: Sequence[Call], repeats: int, stream: torch.cuda.Stream
    ) -> Callable[[], float]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                kept = [call() for call in calls]
                del kept
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def measure() -> float:
            torch.cuda._sleep(SLEEP)  # meanwhile the host hands over the graph
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3 / (repeats * len(calls))

        return measure


def interleaved(
    variants: Mapping[str, Sequence[Call]], clock: Clock, rounds: int = 15, **options: Any
) -> dict[str, Timing]:
    """Time variants against each other: prepare all of them, then `in_turn`.

    Args:
        variants: name -> the calls of one run; several calls share the time of a run evenly.
        clock: what measures a run.
        rounds, options: see `in_turn`.

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
    return in_turn(measures, rounds, **options)


def in_turn(
    measures: Mapping[str, Callable[[], float]],
    rounds: int = 15,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    budget: float | None = None,
    quiet: Quiet | None = None,
    accept: Callable[[], bool] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Timing]:
    """Take samples of all variants in turn.

    Every round runs each variant once, in an order drawn anew, so that a slow spell of the machine
    meets all of them alike.

    Args:
        measures: name -> what `Clock.prepare` returned for the variant.
        rounds: how often each variant runs, at most; at least 1.
        seed: of the order.
        progress: called as ``progress(done, rounds)`` after each round.
        budget: seconds of wall time after which no round begins, if `LEAST_ROUNDS` are done.
        quiet: ends it earlier, once the samples of every variant are enough.
        accept: asked after each round; what was measured in a round that it refuses is dropped and
            the round repeated, up to ``rounds`` times in all, or until the budget is spent. After
            that all rounds count.
        now: the clock of the budget.

    Returns:
        Name -> seconds per call.
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    end = now() + (float("inf") if budget is None else budget)
    done = refused = 0
    while done < rounds:
        late = now() >= end
        if done >= LEAST_ROUNDS and late:
            break
        sample = {name: measures[name]() for name in order.sample(list(measures), len(measures))}
        if accept is not None and refused < rounds and not accept() and not late:
            refused += 1
            continue
        done += 1
        for name, value in sample.items():
            seconds[name].append(value)
        if progress is not None:
            progress(done, rounds)
        if quiet is not None and all(quiet.enough(values) for values in seconds.values()):
            break
    return {name: Timing.of(values) for name, values in seconds.items()}
