"""Find races between the programs of one launch with vector clocks.

A program's accesses fall into segments; a segment ends at an atomic operation. Each segment carries
the program's vector clock: the latest segment of every other program that is known to have finished
before it. A release publishes the clock at the address of the atomic, an acquire takes it over. Two
accesses of different programs are ordered when one's segment is in the other's clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Race", "RaceRecorder"]

Program = tuple[int, ...]
_LOAD, _STORE, _ATOMIC = 0, 1, 2
_KINDS = ("load", "store", "atomic")


@dataclass(frozen=True)
class Race:
    """Two unordered accesses to one element by two programs of one launch."""

    kernel: str
    element: str
    programs: tuple[Program, Program]
    kinds: tuple[str, str]

    def __str__(self) -> str:
        (a, b), (kind_a, kind_b) = self.programs, self.kinds
        return f"kernel {self.kernel}: {self.element}: {kind_a} by {a} against {kind_b} by {b}"


class RaceRecorder:
    """Collects the memory events of one launch; :meth:`find` looks for races among them."""

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel
        self._programs: dict[Program, int] = {}
        self._clocks: list[dict[int, int]] = []  # per program, of the running segment
        self._ended: list[bool] = []  # per program: an atomic closed the segment
        self._published: dict[int, dict[int, int]] = {}  # address -> clock of the releases there
        self._segments: list[tuple[int, int, dict[int, int]]] = []  # program, own time, clock
        self._current: list[int] = []  # per program: index into _segments
        self._events: list[tuple[int, int, np.ndarray]] = []  # segment, kind, addresses

    def plain(self, program: Program, addresses: np.ndarray, store: bool) -> None:
        """Record a plain load or store of elements at `addresses`."""
        self._record(self._number(program), _STORE if store else _LOAD, addresses)

    def atomic(self, program: Program, addresses: np.ndarray, sem: Any, scope: Any) -> None:
        """Record an atomic operation, with Triton's memory semantic and scope."""
        me = self._number(program)
        # scope="cta" orders nothing between programs
        sem_name = "RELAXED" if getattr(scope, "name", "") == "CTA" else getattr(sem, "name", "")
        unique = np.unique(addresses).tolist()
        if sem_name in ("ACQUIRE", "ACQUIRE_RELEASE"):
            for address in unique:
                _join(self._clocks[me], self._published.get(address, {}))
            self._ended[me] = True
        self._record(me, _ATOMIC, addresses)
        if sem_name in ("RELEASE", "ACQUIRE_RELEASE"):
            for address in unique:
                _join(self._published.setdefault(address, {}), self._clocks[me])
            self._ended[me] = True

    def find(self, name_of: Callable[[int], str], limit: int) -> list[Race]:
        """Return at most one race per element, and at most `limit` in all.

        Args:
            name_of: turns an address into the text shown for the element.
        """
        if not self._events or len(self._programs) < 2:
            return []
        address, segment, kind = self._conflicts()
        if not address.size:
            return []
        races: list[Race] = []
        starts = np.flatnonzero(np.diff(address, prepend=-1))
        for begin, end in zip(starts, [*starts[1:], address.size], strict=True):
            if len(races) >= limit:
                break
            pair = self._unordered(segment[begin:end].tolist(), kind[begin:end].tolist())
            if pair is not None:
                programs, kinds = pair
                races.append(Race(self._kernel, name_of(int(address[begin])), programs, kinds))
        return races

    def _number(self, program: Program) -> int:
        number = self._programs.setdefault(program, len(self._programs))
        if number == len(self._clocks):
            self._clocks.append({})
            self._ended.append(True)
            self._current.append(-1)
        return number

    def _record(self, me: int, kind: int, addresses: np.ndarray) -> None:
        if self._ended[me]:
            clock = self._clocks[me]
            clock[me] = clock.get(me, 0) + 1
            self._current[me] = len(self._segments)
            self._segments.append((me, clock[me], dict(clock)))
            self._ended[me] = False
        self._events.append((self._current[me], kind, addresses))

    def _conflicts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The events at elements that two programs touched, one of them writing, by address."""
        lengths = [a.size for _, _, a in self._events]
        address = np.concatenate([a for _, _, a in self._events])
        segment = np.repeat([s for s, _, _ in self._events], lengths)
        kind = np.repeat([k for _, k, _ in self._events], lengths)
        order = np.argsort(address, kind="stable")
        address, segment, kind = address[order], segment[order], kind[order]
        program = np.array([p for p, _, _ in self._segments])[segment]
        starts = np.flatnonzero(np.diff(address, prepend=-1))
        group = np.cumsum(np.diff(address, prepend=-1) != 0) - 1
        if not starts.size:
            return address, segment, kind
        shared = np.minimum.reduceat(program, starts) != np.maximum.reduceat(program, starts)
        written = np.maximum.reduceat(kind, starts) != _LOAD
        plain = np.minimum.reduceat(kind, starts) != _ATOMIC
        keep = (shared & written & plain)[group]
        return address[keep], segment[keep], kind[keep]

    def _unordered(
        self, segments: list[int], kinds: list[int]
    ) -> tuple[tuple[Program, Program], tuple[str, str]] | None:
        events = list(dict.fromkeys(zip(segments, kinds, strict=True)))
        writes = [e for e in events if e[1] != _LOAD]
        for segment_a, kind_a in writes:
            a, time_a, clock_a = self._segments[segment_a]
            for segment_b, kind_b in events:
                b, time_b, clock_b = self._segments[segment_b]
                if a == b or kind_a == kind_b == _ATOMIC:
                    continue
                if clock_b.get(a, 0) < time_a and clock_a.get(b, 0) < time_b:
                    names = list(self._programs)
                    return (names[a], names[b]), (_KINDS[kind_a], _KINDS[kind_b])
        return None


def _join(clock: dict[int, int], other: dict[int, int]) -> None:
    for program, time in other.items():
        if clock.get(program, 0) < time:
            clock[program] = time
