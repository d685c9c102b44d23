"""Which tuned result applies to a problem: that of its size, or of one that is near it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from tritonnorm.device import Device
from tritonnorm.kernels import algorithms_for
from tritonnorm.kernels.base import Config
from tritonnorm.problem import FoldProblem
from tritonnorm.tune.key import Key, Shape
from tritonnorm.tune.revisions import REVISIONS
from tritonnorm.tune.store import Entry

__all__ = ["FARTHEST", "Entries", "transfer"]

# Powers of two in size between a problem and the entry whose choice it may still take: four times
# the values per channel, or twice the channels. Neighbouring layers of a network are one apart.
FARTHEST = 2.0


class Entries:
    """Tuned results that answer look-ups; the first of the same key counts.

    Args:
        name: what a plan says of its source.
        found: the entries. Those of another kernel revision are left out.
        farthest: how far apart sizes may be; with 0 only those of one bucket are near.
    """

    def __init__(self, name: str, found: Iterable[Entry], farthest: float = 0.0) -> None:
        self.name, self.farthest = name, farthest
        self.exact: dict[Key, Entry] = {}
        self.groups: defaultdict[Any, list[Entry]] = defaultdict(list)
        for entry in found:
            if REVISIONS.get(entry.algorithm) == entry.revision and entry.key not in self.exact:
                self.exact[entry.key] = entry
                self.groups[entry.key.group].append(entry)

    def __len__(self) -> int:
        return len(self.exact)

    def lookup(self, problem: Shape, device: Device) -> tuple[str, Config] | None:
        """Algorithm and configuration for a problem, or None."""
        if not self.exact:
            return None
        key = Key.of(problem)
        entry = self.exact.get(key) or self._near(key)
        return None if entry is None else transfer(entry, problem, device)

    def _near(self, key: Key) -> Entry | None:
        near = [
            e
            for e in self.groups.get(key.group, ())
            if e.key.bucket == key.bucket or key.distance(e.key) <= self.farthest
        ]
        return min(near, key=lambda e: key.distance(e.key), default=None)

    def closest(self, key: Key, most: int = 3) -> list[Entry]:
        """The entries whose keys differ from ``key`` in the fewest fields, and then in size."""

        def apart(entry: Entry) -> tuple[int, float]:
            differ = sum(a != b for a, b in zip(entry.key.group, key.group, strict=True))
            same_kind = entry.key.kind == key.kind
            return differ, key.distance(entry.key) if same_kind else math.inf

        return sorted(self.exact.values(), key=apart)[:most]


def transfer(entry: Entry, problem: Shape, device: Device) -> tuple[str, Config] | None:
    """The choice of an entry for a problem of about the same size: the candidate most like it.

    Only what the algorithm offers for the problem is ever taken, so an entry of a larger problem
    cannot ask for more registers than there are, and one that is nonsense asks for nothing.
    """
    try:
        algorithm = next(a for a in algorithms_for(problem) if a.name == entry.algorithm)
        if algorithm.supports(problem, device) is not None:
            return None
        wanted = Config(**entry.config)
        candidates = algorithm.configs(problem, device)
        if wanted in candidates and entry.key == Key.of(problem):
            return algorithm.name, wanted
        before = _measures(wanted, entry.key.problem(), int(entry.device["sms"]))
        best = min(candidates, key=lambda c: _apart(_measures(c, problem, device.sms), before))
        return algorithm.name, best
    except (StopIteration, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None


def _measures(config: Config, problem: Any, sms: int) -> list[float]:
    """A configuration as numbers that mean the same for every size and GPU: logarithms, and instead
    of splits the programs per multiprocessor."""
    values = {f.name: float(getattr(config, f.name)) for f in fields(config)}
    if not isinstance(problem, FoldProblem):
        values["splits"] *= config.channel_blocks(problem) / sms
    return [math.log2(v) if v > 0 else v - 8.0 for v in values.values()]


def _apart(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))
