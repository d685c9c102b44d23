"""Which algorithm computes a problem, in which configuration, and why.

`choose` is pure: the same problem, device and tables give the same plan, without a GPU too. The
operators keep what it answers (`recipe`); `plan` asks it with what is forced at the moment. The
order of authority: forced > tables (in the order given: the user's cache, the shipped table of this
GPU, the nearest entry of its architecture) > formula. Nothing is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .device import Device
from .group_problem import GroupProblem, minimum_group_bytes
from .kernels import BY_NAME, algorithms_for
from .kernels.base import Algorithm, Config
from .problem import Problem, minimum_bytes


@dataclass(frozen=True)
class Plan:
    """An algorithm, its configuration, and what decided ("forced", a table's name, or
    "formula")."""

    algorithm: str
    config: Config
    source: str

    @property
    def runs(self) -> Algorithm:
        """The algorithm itself."""
        found: Algorithm = BY_NAME[self.algorithm]
        return found


class Table(Protocol):
    """Tuned results: what a user cache or a shipped table must answer."""

    name: str

    def lookup(self, problem: Problem | GroupProblem, device: Device) -> tuple[str, Config] | None:
        """Algorithm and configuration for a problem, or None."""


@dataclass(frozen=True)
class Forced:
    """A decision made by hand: an algorithm, and optionally its configuration."""

    algorithm: str
    config: Config | None = None


def choose(
    problem: Problem | GroupProblem,
    device: Device,
    tables: Sequence[Table] = (),
    forced: Forced | None = None,
) -> Plan:
    """Choose how to compute a problem on a device.

    Args:
        problem: what to compute.
        device: where; any description will do, no GPU is needed.
        tables: tuned results, the most trusted first.
        forced: a decision that overrules them, where it can compute the problem.

    Raises:
        ValueError: ``forced.algorithm`` is not an algorithm.
    """
    if forced is not None:
        if forced.algorithm not in BY_NAME:
            raise ValueError(
                f"algorithm: expected one of {', '.join(BY_NAME)}; got {forced.algorithm!r}"
            )
        algorithm = BY_NAME[forced.algorithm]
        fits = algorithm in algorithms_for(problem)
        if fits and algorithm.supports(problem, device) is None:
            config = forced.config or algorithm.heuristic(problem, device)
            return Plan(algorithm.name, config, "forced")
    for table in tables:
        found = table.lookup(problem, device)
        if found is not None and BY_NAME[found[0]].supports(problem, device) is None:
            return Plan(*found, table.name)
    able = [
        (algorithm, algorithm.heuristic(problem, device))
        for algorithm in algorithms_for(problem)
        if algorithm.supports(problem, device) is None
    ]
    if not able:
        raise ValueError(f"problem: no algorithm supports {problem}")
    algorithm, config = min(able, key=lambda pair: pair[0].predict(problem, pair[1], device))
    return Plan(algorithm.name, config, "formula")


_forced: Forced | None = None


@contextlib.contextmanager
def force_plan(algorithm: str, config: Config | None = None) -> Iterator[None]:
    """Within the context every problem that ``algorithm`` supports is computed by it.

    Args:
        algorithm: "resident", "split" or "affine" for batch norms, "group_resident" or
            "group_split" for the other norms.
        config: its configuration; the formula's if None.

    Raises:
        ValueError: the algorithm is unknown.
    """
    global _forced
    if algorithm not in BY_NAME:
        raise ValueError(f"algorithm: expected one of {', '.join(BY_NAME)}; got {algorithm!r}")
    before, _forced = _forced, Forced(algorithm, config)
    try:
        yield
    finally:
        _forced = before


def forced() -> Forced | None:
    """What `force_plan` forces at the moment."""
    return _forced


def plan(problem: Problem | GroupProblem, device: Device) -> Plan:
    """`choose` with what is forced at the moment: what the operators take for the problem."""
    return choose(problem, device, (), _forced)


def fewest_bytes(problem: Problem | GroupProblem) -> int:
    """`minimum_bytes` or `minimum_group_bytes`, by the kind of problem."""
    if isinstance(problem, GroupProblem):
        return minimum_group_bytes(problem)
    return minimum_bytes(problem)


@dataclass(frozen=True)
class Alternative:
    """One algorithm's answer to a problem: why not, or how and at what cost."""

    algorithm: str
    reason: str | None
    config: Config | None
    bytes: int | None
    microseconds: float | None


@dataclass(frozen=True)
class Explanation:
    """A plan and its alternatives; ``str()`` of it is a table.

    Attributes:
        plan: what `choose` answers.
        minimum: fewest bytes of the problem (`minimum_bytes`, `minimum_group_bytes`).
        alternatives: one row per algorithm, with the bytes it moves and the time predicted for it.
    """

    problem: Problem | GroupProblem
    device: Device
    plan: Plan
    minimum: int
    alternatives: tuple[Alternative, ...]

    def __str__(self) -> str:
        config = self.plan.config
        lines = [
            f"{self.problem.direction} of {self.problem}, "
            f"{str(self.problem.dtype).removeprefix('torch.')}, on {self.device.name}",
            f"-> {self.plan.algorithm} ({self.plan.source}), {config}",
            f"   fewest bytes {self.minimum:,}",
        ]
        for a in self.alternatives:
            if a.bytes is None:
                lines.append(f"   {a.algorithm:<10} no: {a.reason}")
            else:
                ratio = a.bytes / self.minimum
                lines.append(
                    f"   {a.algorithm:<10} {a.bytes:,} bytes, {ratio:.2f}x the fewest, "
                    f"{a.microseconds:.1f} us predicted"
                )
        return "\n".join(lines)


def explain(
    problem: Problem | GroupProblem, device: Device, forced: Forced | None = None
) -> Explanation:
    """Say which algorithm computes a problem, who decided, and what the others would cost."""
    rows = []
    for algorithm in algorithms_for(problem):
        reason = algorithm.supports(problem, device)
        if reason is not None:
            rows.append(Alternative(algorithm.name, reason, None, None, None))
            continue
        config = algorithm.heuristic(problem, device)
        moved = algorithm.model_bytes(problem, config)
        seconds = algorithm.predict(problem, config, device)
        rows.append(Alternative(algorithm.name, None, config, moved, seconds * 1e6))
    chosen = choose(problem, device, (), forced)
    return Explanation(problem, device, chosen, fewest_bytes(problem), tuple(rows))
