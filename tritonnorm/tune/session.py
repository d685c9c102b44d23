"""A run of the tuner: one problem after the other, each result kept as soon as it is there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tritonnorm.device import Device
from tritonnorm.kernels.base import Config
from tritonnorm.tune import standing
from tritonnorm.tune.jobs import Job, Result, candidates_for, run_job
from tritonnorm.tune.key import Key, Shape
from tritonnorm.tune.prune import Pruned, prune
from tritonnorm.tune.revisions import REVISIONS
from tritonnorm.tune.search import Candidate
from tritonnorm.tune.store import Entry

__all__ = ["Session", "Summary", "Tuned", "environment"]

# Of measuring, per problem: 30 candidates of half a second each, compiled and checked, and the last
# measurement. Less than 2 s measures little more than one of them.
MOST_SECONDS, LEAST_SECONDS = 20.0, 2.0
SLOWER = 1.02  # `--check`: beyond it a choice has lost to the formula


@dataclass(frozen=True)
class Tuned:
    """One problem that is done.

    Attributes:
        key: the problem.
        result: what came of it.
        before: the choice that was there, or None.
        kept: whether the result is on disk.
    """

    key: Key
    result: Result
    before: Candidate | None = None
    kept: bool = False

    @property
    def changed(self) -> bool:
        """Whether there is another choice now."""
        return self.result.best is not None and self.result.best != self.before

    @property
    def lost(self) -> bool:
        """Whether the formula's choice is faster than this one."""
        return self.result.us > SLOWER * self.result.formula_us > 0


@dataclass
class Summary:
    """What a run did.

    Attributes:
        total: problems that there were.
        done: those that were tuned or checked.
        skipped: those that had a result already.
        failures: reason -> candidates.
        stopped: why the run ended early, or None.
    """

    total: int = 0
    done: list[Tuned] = field(default_factory=list)
    skipped: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    stopped: str | None = None


class Session:
    """Tunes problems on one GPU.

    Args:
        device: what a plan knows of it.
        index: its number.
        budget: seconds for everything, or None.
        resume: leave out problems of which the cache has a result.
        processes: that compile at once.
        seed: of tensors and orders.
        job: does one problem; for tests.
        pruned: drops candidates by their machine code; for tests.
    """

    def __init__(
        self,
        device: Device,
        *,
        index: int = 0,
        budget: float | None = None,
        resume: bool = False,
        processes: int = 1,
        seed: int = 0,
        job: Callable[..., Result] = run_job,
        pruned: Callable[..., Iterable[tuple[Any, Pruned]]] = prune,
    ) -> None:
        self.device, self.index, self.budget = device, index, budget
        self.resume, self.processes, self.seed = resume, processes, seed
        self.job, self.pruned = job, pruned

    def tune(
        self,
        problems: Iterable[Shape],
        progress: Callable[[Summary, str], None] = lambda summary, what: None,
    ) -> Summary:
        """Tune all of them, and keep every result as it comes; an interrupt ends it early.

        Args:
            problems: in any order, each counted once.
            progress: called before and after every problem with what is there so far.
        """
        wanted = {Key.of(p): p for p in problems}
        known = self._known()
        summary = Summary(total=len(wanted))
        if self.resume:
            summary.skipped = sum(key in known for key in wanted)
            wanted = {key: p for key, p in wanted.items() if key not in known}
        end = None if self.budget is None else time.monotonic() + self.budget
        todo = {key: (p, candidates_for(p, self.device)) for key, p in wanted.items()}
        try:
            progress(summary, "compiling")
            left = len(todo)
            for key, result in self.pruned(todo, self.device, self.processes):
                seconds = _share(end, left)
                if seconds is None:
                    summary.stopped = "the budget is spent"
                    break
                left -= 1
                summary.failures.update(result.reasons)
                progress(summary, str(key))
                summary.done.append(self._one(key, result.kept, known.get(key), seconds))
                summary.failures.update(summary.done[-1].result.failures)
                progress(summary, str(key))
        except KeyboardInterrupt:
            summary.stopped = "interrupted"
        return summary

    def check(
        self,
        problems: Iterable[Shape],
        progress: Callable[[Summary, str], None] = lambda summary, what: None,
    ) -> Summary:
        """Time the choices that the cache has against the formula's; nothing is kept.

        Args:
            problems: those to check; all that the cache has if there are none.
            progress: as in `tune`.
        """
        known = self._known()
        keys = {Key.of(p) for p in problems} or set(known)
        summary = Summary(total=len(keys), skipped=len(keys - set(known)))
        try:
            for key in sorted(keys & set(known), key=str):
                progress(summary, str(key))
                first = candidates_for(key.problem(), self.device)[0]
                before = known[key]
                pair = tuple(dict.fromkeys([first, before]))
                job = Job(key, pair, before, MOST_SECONDS, self.index, self.seed)
                summary.done.append(Tuned(key, self.job(job), before))
                summary.failures.update(summary.done[-1].result.failures)
                progress(summary, str(key))
        except KeyboardInterrupt:
            summary.stopped = "interrupted"
        return summary

    def _known(self) -> dict[Key, Candidate]:
        """The choices of this GPU in the cache, of the kernels as they are."""
        mine = [
            e
            for e in standing.cache().entries()
            if e.device == self.device.identity and REVISIONS.get(e.algorithm) == e.revision
        ]
        found: dict[Key, Candidate] = {}
        for e in mine:
            try:
                found[e.key] = (e.algorithm, Config(**e.config))
            except TypeError:  # fields of another release
                continue
        return found

    def _one(
        self, key: Key, kept: Sequence[Candidate], before: Candidate | None, seconds: float
    ) -> Tuned:
        if not kept:
            return Tuned(key, Result(error="no configuration is worth timing"), before)
        job = Job(key, tuple(kept), before, seconds, self.index, self.seed)
        result = self.job(job)
        if result.best is None:
            return Tuned(key, result, before)
        algorithm, config = result.best
        entry = Entry(
            *(self.device.identity, key, algorithm, asdict(config), REVISIONS[algorithm]),
            *(round(result.us, 3), round(result.formula_us, 3), environment()),
        )
        return Tuned(key, result, before, standing.put(entry))


def _share(end: float | None, left: int) -> float | None:
    """Seconds for the next of so many problems, or None if there is no time."""
    if end is None:
        return MOST_SECONDS
    remaining = end - time.monotonic()
    if remaining < LEAST_SECONDS:
        return None
    return min(MOST_SECONDS, max(LEAST_SECONDS, remaining / left))


def environment() -> Mapping[str, str]:
    """What a tuned result may depend on besides the GPU, for people to see."""
    import triton

    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
    }
