"""A GPU that is made up: CPU tensors, a clock that computes its samples, no NVML.

The harness runs whole on it. A provider's time is the fewest bytes of the case over a share of the
bandwidth, plus launches, plus noise from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bench.folds import FoldRun
from bench.runner import Run
from tritonnorm.device import Device

#: Small caches, so that few sets of small tensors exceed them.
FACTS = Device("Simulated GPU", "sm_90", 132, l2_bytes=100_000, bandwidth=4.8e12)
COPY = 4.2e12
SHARES = {"tritonnorm": 0.9, "eager": 0.4, "compile": 0.7}


@dataclass
class SimulatedClock:
    """Runs the first call, and says how long all would take on a GPU.

    Attributes:
        shares: of the copy bandwidth that a provider reaches.
        noise: standard deviation over the mean.
        sets: how many calls each prepared provider had, in order.
    """

    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))
    noise: float = 0.002
    sets: list[int] = field(default_factory=list)

    def prepare(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        self.sets.append(len(calls))
        calls[0]()
        draw = random.Random(len(self.sets))
        run = calls[0]
        if isinstance(run, Run | FoldRun):
            name = run.name if isinstance(run, FoldRun) else run.provider.name
            case = run.case
            fewest = case.bytes if isinstance(run, FoldRun) else case.bytes_past(FACTS.l2_bytes)
            seconds = 2e-6 + fewest / (COPY * self.shares.get(name, 0.5))
        else:
            seconds = 2 * (1 << 20) / COPY  # a roof
        return lambda: seconds * max(0.1, draw.gauss(1.0, self.noise))


@dataclass
class SimulatedGpu:
    """A `bench.machine.Machine`; what it answers can be set."""

    facts: Device = FACTS
    clock: SimulatedClock = field(default_factory=SimulatedClock)
    refusals: int = 0
    free: int | None = None
    host: float | None = 1e-6
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    refused: bool = False

    def accept(self) -> bool:
        if self.refusals:
            self.refusals -= 1
            self.refused = True
            return False
        return True

    def throttled(self) -> bool:
        refused, self.refused = self.refused, False
        return refused

    def sm_mhz(self) -> float | None:
        return 1980.0

    def host_seconds(self, call: Callable[[], object]) -> float | None:
        call()
        return self.host

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        call()
        return 1_000_000

    def free_bytes(self) -> int | None:
        return self.free
