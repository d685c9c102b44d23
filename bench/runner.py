"""The run: every case by every provider, first that it is right, then how long it takes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from bench.call import Tensors
from bench.check import check
from bench.launches import observe
from bench.machine import Machine
from bench.processes import one_line
from bench.providers import Provider
from bench.providers.base import Forward
from bench.record.file import implausible
from bench.record.rows import NOISY, OpRow, SkippedRow
from bench.suites import Case
from tritonnorm.timing import Quiet, Timing, in_turn

__all__ = ["DEFAULTS", "Options", "Run", "flags_of", "measure"]

ROTATION = 4  # times the last-level cache that the buffers of all calls fill together
MOST_SETS = 256  # buffers in turn; with more, the graph of a tiny case takes longer than its timing


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        warm: one set of tensors over and over, so that small ones stay in the last-level cache.
        rounds: the most samples of a case.
        seconds: the wall time after which a case takes no more samples.
        seed: of the data and of the order of the providers.
        host: also measure host time and peak memory.
    """

    warm: bool = False
    rounds: int = 200
    seconds: float = 0.5
    seed: int = 0
    host: bool = True


DEFAULTS = Options()


@dataclass(frozen=True)
class Run:
    """One call of one provider on one set of tensors: what a clock measures."""

    provider: Provider
    case: Case
    forward: Forward
    tensors: Tensors
    kept: list[torch.Tensor] = field(default_factory=list)  # the output that a backward starts at

    def __call__(self) -> object:
        with self.provider.around():
            if self.case.mode == "inference":
                with torch.inference_mode():
                    return self.forward(self.tensors)
            if self.case.mode == "forward":
                return self.forward(self.tensors)
            if self.case.mode == "forward+backward":
                y = self.forward(self.tensors)
                # With y, as all outputs must take turns in memory: one that is written again before
                # it left the cache costs no DRAM.
                return y, torch.autograd.grad(y, self.tensors.inputs, self.tensors.dy)
            if not self.kept:  # on the stream of whoever calls first: the one that is captured
                self.kept.append(self.forward(self.tensors))
            return self.tensors.backward(self.kept[0])


def measure(
    case: Case,
    providers: Sequence[Provider],
    machine: Machine,
    roofs: tuple[float | None, float | None] = (None, None),
    options: Options = DEFAULTS,
) -> tuple[list[OpRow], list[SkippedRow]]:
    """Check and time a case.

    Args:
        case: what to compute.
        providers: by whom; those that import here.
        machine: where.
        roofs: theoretical and measured copy bandwidth in 1e9 bytes a second.
        options: how.

    Returns:
        A row per provider that was right, and for the others why they are not there.
    """
    needed = _needed(case, machine, options)
    free = machine.free_bytes()
    if free is not None and needed > free:
        reason = f"needs about {needed / 1e9:.1f} GB of device memory, {free / 1e9:.1f} GB are free"
        return [], [SkippedRow(provider.name, str(case), reason) for provider in providers]
    generator = torch.Generator(machine.device).manual_seed(options.seed)
    sets: list[Any] = [
        case.tensors(machine.device, generator) for _ in range(_sets(case, machine, options))
    ]
    skipped: list[SkippedRow] = []
    ready: dict[str, _Ready] = {}
    try:
        for provider in providers:
            try:
                found = provider.refuses(case) or _ready(case, provider, sets, machine)
            except Exception as error:  # a peer may fail in any way; the others are measured
                found = one_line(error, most=200)
            if isinstance(found, str):
                skipped.append(SkippedRow(provider.name, str(case), found))
            else:
                ready[provider.name] = found
        rows = []
        for row in _timed(case, ready, len(sets), machine, roofs, options) if ready else ():
            # One such row must not cost the others: a results file that has it is refused.
            if (doubt := implausible(asdict(row), roofs[0])) is not None:
                skipped.append(SkippedRow(row.provider, str(case), doubt))
            else:
                rows.append(row)
    finally:
        if "torch._dynamo" in sys.modules:  # or the eighth shape would silently run eagerly
            torch._dynamo.reset()
    return rows, skipped


@dataclass(frozen=True)
class _Ready:
    """A provider that was right: its first run, its error, and what measures all its runs."""

    run: Run
    error: float
    measure: Callable[[], float]


def _ready(case: Case, provider: Provider, sets: Sequence[Tensors], machine: Machine) -> _Ready:
    forward = provider.setup(case)
    with observe(operators=False) as seen:
        error = check(case, provider, forward, sets[0])
    if provider.kernels and not seen.compiled and not seen.interpreted:
        raise RuntimeError("none of its kernels ran: TRITONNORM_LOG=info tells why")
    runs = [
        Run(provider, case, forward, tensors.with_own_statistics(provider.in_place))
        for tensors in sets
    ]
    return _Ready(runs[0], error, machine.clock.prepare(runs))


def _timed(
    case: Case,
    ready: dict[str, _Ready],
    sets: int,
    machine: Machine,
    roofs: tuple[float | None, float | None],
    options: Options,
) -> list[OpRow]:
    machine.throttled()  # what happened before does not count
    timings = in_turn(
        {name: one.measure for name, one in ready.items()},
        options.rounds,
        options.seed,
        budget=options.seconds * len(ready),
        quiet=Quiet(),
        accept=machine.accept,
    )
    sm_mhz, throttled = machine.sm_mhz(), machine.throttled()
    fits = sets * case.footprint < ROTATION * machine.facts.l2_bytes
    rows = []
    for name, timing in timings.items():
        run = ready[name].run
        host = machine.host_seconds(run) if options.host else None
        peak = machine.peak_bytes(run) if options.host else None
        fewest = case.bytes_past(machine.facts.l2_bytes)
        gb_s = fewest / timing.median * 1e-9
        of_peak, of_copy = (None if roof is None else 100.0 * gb_s / roof for roof in roofs)
        row = OpRow(
            *(case.call.op, case.mode, case.call.layout, case.call.type, case.call.size, name),
            cache="warm" if options.warm else "cold",
            p50_us=timing.median * 1e6,
            p20_us=timing.p20 * 1e6,
            p80_us=timing.p80 * 1e6,
            noise=timing.noise,
            samples=timing.rounds,
            bytes=fewest,
            gb_s=gb_s,
            peak_percent=of_peak,
            copy_percent=of_copy,
            host_us=None if host is None else host * 1e6,
            peak_mb=None if peak is None else peak / 1e6,
            x_eager=_ratio(timings, "eager", timing),
            x_compile=_ratio(timings, "compile", timing),
            flags="",
            plan=run.provider.plan(case, run.tensors),
            error=ready[name].error,
            sm_mhz=sm_mhz,
        )
        rows.append(replace(row, flags=flags_of(row, throttled, fits)))
    return rows


def flags_of(row: OpRow, throttled: bool, fits: bool) -> str:
    """The letters of `bench.record.rows.FLAGS` that a row earns."""
    host_bound = row.host_us is not None and row.host_us > row.p50_us
    earned = {
        "T": throttled,
        "N": row.noise > NOISY,
        "C": fits,
        "H": host_bound,
        "?": row.peak_percent is None,
    }
    return "".join(letter for letter, is_so in earned.items() if is_so)


def _ratio(timings: dict[str, Timing], of: str, timing: Timing) -> float | None:
    return timings[of].median / timing.median if of in timings else None


def _sets(case: Case, machine: Machine, options: Options) -> int:
    """How many sets of tensors take turns."""
    if options.warm:
        return 1
    wanted = math.ceil(ROTATION * machine.facts.l2_bytes / case.footprint)
    return max(1, min(wanted, MOST_SETS))


def _needed(case: Case, machine: Machine, options: Options) -> int:
    """Device memory of a case: inputs and outputs of all sets, saved tensors, the float64 check."""
    return 2 * _sets(case, machine, options) * case.footprint + 3 * case.footprint + (3 << 30)
