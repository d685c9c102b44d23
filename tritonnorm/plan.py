"""Which algorithm computes a problem, in which configuration, and why.

`choose` is pure: the same problem, device and tables give the same plan, without a GPU too. `plan`
asks it with what is forced at the moment and with the tuned results that count in this process, and
the operators keep its answer (`recipe`). The order of authority: forced > tables (in the order
given: the user's cache, the shipped table of this GPU, the nearest entry of its architecture) >
formula. Nothing is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from . import settings
from .device import Device
from .kernels import BY_NAME, FOLDS, algorithms_for
from .kernels.base import Algorithm, Config
from .norms.problem import GroupProblem, minimum_group_bytes
from .problem import Problem, minimum_bytes
from .tune import agree
from .tune.key import Key, Shape
from .tune.standing import SEEN, on_change
from .tune.standing import standing as tuned
from .tune.store import append_line

__all__ = [
    "Forced",
    "Plan",
    "Table",
    "Untuned",
    "choose",
    "force_plan",
    "forced",
    "in_company",
    "on_change",
    "plan",
    "tuned",
]

NAMES = (*BY_NAME, *(a.name for a in FOLDS), "formula")


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

    def lookup(self, problem: Any, device: Device) -> tuple[str, Config] | None:
        """Algorithm and configuration for a problem, or None."""


@dataclass(frozen=True)
class Forced:
    """A decision made by hand: an algorithm, and optionally its configuration; or "formula"."""

    algorithm: str
    config: Config | None = None


FORMULA = Forced("formula")


class Untuned(LookupError):
    """There is no tuned result for a problem, and TRITONNORM_STRICT asks for one."""


def choose(
    problem: Shape,
    device: Device,
    tables: Sequence[Table] = (),
    forced: Forced | None = None,
) -> Plan:
    """Choose how to compute a problem on a device.

    Args:
        problem: what to compute.
        device: where; any description will do, no GPU is needed.
        tables: tuned results, the most trusted first.
        forced: a decision that overrules them, where it can compute the problem. "formula" leaves
            the tables out: they grow, and another split rounds otherwise.

    Raises:
        ValueError: ``forced.algorithm`` is not an algorithm.
    """
    there = {a.name: a for a in algorithms_for(problem)}
    if forced is not None:
        _check_name(forced.algorithm)
        if forced.algorithm == "formula":
            tables = ()
        algorithm = there.get(forced.algorithm)
        if algorithm is not None and algorithm.supports(problem, device) is None:
            config = forced.config or algorithm.heuristic(problem, device)
            return Plan(algorithm.name, config, "forced")
    for table in tables:
        found = table.lookup(problem, device)
        if found is not None and there[found[0]].supports(problem, device) is None:
            return Plan(*found, table.name)
    able = [
        (algorithm, algorithm.heuristic(problem, device))
        for algorithm in there.values()
        if algorithm.supports(problem, device) is None
    ]
    if not able:
        raise ValueError(f"problem: no algorithm supports {problem}")
    algorithm, config = min(able, key=lambda pair: pair[0].predict(problem, pair[1], device))
    return Plan(algorithm.name, config, "formula")


def _check_name(algorithm: str) -> None:
    if algorithm not in NAMES:
        raise ValueError(f"algorithm: expected one of {', '.join(NAMES)}; got {algorithm!r}")


_forced: Forced | None = None


@contextlib.contextmanager
def force_plan(algorithm: str, config: Config | None = None) -> Iterator[None]:
    """Within the context every problem that ``algorithm`` supports is computed by it.

    Args:
        algorithm: "resident", "persistent", "split" or "affine" for batch norms, "group_resident"
            or "group_split" for the other norms, "masked" for padded sequences, "fold" for the fold
            of a frozen model; "formula"
            for what is chosen without tuned results.
        config: its configuration; the formula's if None.

    Raises:
        ValueError: the algorithm is unknown.
    """
    global _forced
    _check_name(algorithm)
    before, _forced = _forced, Forced(algorithm, config)
    try:
        yield
    finally:
        _forced = before


def forced() -> Forced | None:
    """What `force_plan` forces at the moment; under deterministic algorithms the formula, whose
    choice no tuned result can change."""
    if _forced is None and torch.are_deterministic_algorithms_enabled():
        return FORMULA
    return _forced


def plan(problem: Shape, device: Device, by_hand: Forced | None = None) -> Plan:
    """What the operators take for a problem: `choose`, with the tuned results of this process.

    Args:
        by_hand: what is forced; None for what `force_plan` forces at the moment.

    Raises:
        Untuned: TRITONNORM_STRICT is set, and nothing was tuned for the problem on this GPU.
    """
    tables = tuned(device)
    by_hand = by_hand or forced()
    chosen = choose(problem, in_company(device), tables, by_hand)
    if by_hand is None and tables and chosen.source not in ("forced", *SEEN):
        if (file := settings.record_file()) is not None:
            append_line(file, Key.of(problem).to_json())
        if settings.strict():
            raise Untuned(_missing(Key.of(problem), tables[-1]))
        settings.logger.debug("%s: no tuned result, %s", Key.of(problem), chosen.source)
    return chosen


def in_company(device: Device) -> Device:
    """The device as this process finds it: where gradients are reduced while others are computed,
    collectives hold some of it."""
    if not agree.has_collectives():
        return device
    return replace(device, held=min(HELD, device.sms // 4))


# NCCL has a program per channel, which fills most of a multiprocessor, and waits there for other
# ranks. An estimate of its channels, to be measured; at most a quarter, for small parts of a GPU.
HELD = 32


def fewest_bytes(problem: Problem | GroupProblem) -> int:
    """`minimum_bytes` or `minimum_group_bytes`, by the kind of problem."""
    if isinstance(problem, GroupProblem):
        return minimum_group_bytes(problem)
    return minimum_bytes(problem)


def _missing(key: Key, known: Any) -> str:
    """What there is instead of a tuned result."""
    lines = [f"TRITONNORM_STRICT is set, and there is no tuned result for {key}"]
    for entry in known.closest(key):
        ours, theirs = key.to_json(), entry.key.to_json()
        differ = [f"{n}: {theirs[n]} for {v}" for n, v in ours.items() if theirs[n] != v]
        if entry.device["sms"]:
            lines.append(f"near: {entry.key} ({'; '.join(differ) or 'on another GPU'})")
    return "\n".join([*lines, "`tritonnorm tune` makes one"])
