"""The search for the fastest configuration of one problem: successive halving.

Every candidate is checked, and measured once. Those that are far behind go; the rest are measured
five times in turn, and the best quarter goes into a measurement that lasts until its noise does not
fall any further. What was the choice before stays it unless another one is clearly faster.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tritonnorm.kernels.base import Config
from tritonnorm.timing import Clock, Quiet, Timing, in_turn

__all__ = ["Candidate", "Outcome", "Trial", "Wrong", "search"]

Candidate = tuple[str, Config]
# Once is enough to see a tenfold difference: a sample is the mean of a run of at least 200 us.
FIRST_LIMIT = 10.0
# Five samples of a quiet GPU lie within a few percent; 1.3 leaves room for a noisy one.
SECOND_LIMIT, SHARE = 1.3, 0.25
# Below 2 % a difference may be gone with the next driver, and each new choice is a line to review.
CLEARLY = 1.02


class Wrong(RuntimeError):
    """What a candidate computes is not right."""


class Trial(Protocol):
    """A problem with its tensors."""

    def calls(self, candidate: Candidate) -> Sequence[Callable[[], Any]]:
        """What is timed: the candidate on sets of tensors that together exceed the caches.

        Raises:
            Exception: it does not compile, or does not fit.
        """

    def check(self, candidate: Candidate) -> None:
        """Compute once into outputs full of NaN and compare with the reference.

        Raises:
            Wrong: it differs, or an element was not written.
        """


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        best: the choice, or None if no candidate worked.
        timing: of the choice.
        formula: of the formula's choice, or None if that did not work.
        tried: candidates that were measured.
        failures: reason -> how many candidates.
        complete: whether the budget sufficed for the last measurement.
    """

    best: Candidate | None = None
    timing: Timing | None = None
    formula: Timing | None = None
    tried: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    complete: bool = False


def search(
    candidates: Sequence[Candidate],
    trial: Trial,
    clock: Clock,
    *,
    incumbent: Candidate | None = None,
    budget: float = 20.0,
    seed: int = 0,
    begin: Callable[[Candidate], None] = lambda candidate: None,
    fatal: Callable[[Exception], bool] = lambda error: False,
    now: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Find the fastest of the candidates.

    Args:
        candidates: the formula's choice first. Each is checked before it may win.
        trial: checks and makes what is timed.
        clock: measures (`timing.GpuClock`).
        incumbent: the choice so far, which stays unless another is clearly faster; the formula's
            if None.
        budget: seconds after which no new measurement begins.
        seed: of the order of measurements.
        begin: told each candidate before it first runs.
        fatal: whether after such an error of a candidate nothing else can be measured.
        now: the clock of the budget.

    Raises:
        ValueError: there are no candidates.
        Exception: an error that is fatal.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one, got none")
    formula = candidates[0]
    keep = incumbent or formula
    outcome = Outcome()
    end = now() + budget
    measures: dict[Candidate, Callable[[], float]] = {}
    once: dict[Candidate, float] = {}
    # The choice so far and the formula's first: a budget that is too small then changes nothing.
    for candidate in dict.fromkeys([keep, formula, *candidates]):
        if once and now() >= end:
            return _settled(outcome, {c: Timing.of([t]) for c, t in once.items()}, keep, formula)
        begin(candidate)
        try:
            trial.check(candidate)
            measure = clock.prepare(trial.calls(candidate))
            once[candidate] = measure()
        except Exception as error:
            if fatal(error):
                raise
            outcome.failures[_reason(error)] += 1
            continue
        outcome.tried += 1
        if once[candidate] <= FIRST_LIMIT * min(once.values()):
            measures[candidate] = measure  # the graph of one that is out would only hold memory
    if not once:
        return outcome
    fixed = (keep, formula)
    second = _timed(_within(measures, once, FIRST_LIMIT, fixed), 5, end, seed, now)
    medians = {c: t.median for c, t in second.items()}
    survivors = _within({c: measures[c] for c in second}, medians, SECOND_LIMIT, fixed)
    most = max(2, round(outcome.tried * SHARE))
    ranked = sorted(survivors, key=lambda c: medians[c])[:most]
    last = {c: measures[c] for c in dict.fromkeys([*ranked, *fixed]) if c in survivors}
    outcome.complete = now() < end
    if not outcome.complete:
        return _settled(outcome, second, keep, formula)
    return _settled(outcome, _timed(last, 400, end, seed + 1, now, Quiet()), keep, formula)


def _within(
    measures: Mapping[Candidate, Any],
    seconds: Mapping[Candidate, float],
    limit: float,
    fixed: Sequence[Candidate],
) -> dict[Candidate, Any]:
    """Those that are not behind the best by more than ``limit``, and those that must stay."""
    most = limit * min(seconds[c] for c in measures)
    return {c: m for c, m in measures.items() if seconds[c] <= most or c in fixed}


def _timed(
    measures: Mapping[Candidate, Callable[[], float]],
    rounds: int,
    end: float,
    seed: int,
    now: Callable[[], float],
    quiet: Quiet | None = None,
) -> dict[Candidate, Timing]:
    names = {str(i): c for i, c in enumerate(measures)}
    found = in_turn(
        {name: measures[c] for name, c in names.items()},
        rounds,
        seed=seed,
        budget=max(0.0, end - now()),
        quiet=quiet,
        now=now,
    )
    return {names[name]: timing for name, timing in found.items()}


def _settled(
    outcome: Outcome,
    timings: Mapping[Candidate, Timing],
    keep: Candidate,
    formula: Candidate,
) -> Outcome:
    """The fastest, if it is clearly faster than the choice so far: by 2 %, and beyond the noise."""
    best = min(timings, key=lambda c: timings[c].median)
    before = timings.get(keep)
    if before is not None:
        new = timings[best]
        clear = before.median > CLEARLY * new.median and before.p20 > new.p80
        best = best if clear else keep
    outcome.best, outcome.timing = best, timings[best]
    outcome.formula = timings.get(formula)
    return outcome


def _reason(error: Exception) -> str:
    """Why a candidate failed, in words that many of them share."""
    name = type(error).__name__
    if isinstance(error, Wrong):
        return str(error)
    known = {
        "OutOfResources": "needs more registers or shared memory than there are",
        "CompileError": "does not compile",
        "CompilationError": "does not compile",
        "PTXASError": "does not compile",
        "OutOfMemoryError": "does not fit into memory",
    }
    return known.get(name, name)
