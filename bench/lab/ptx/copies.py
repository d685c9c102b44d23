"""Copies from global to shared memory that are on their way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bench.lab.ptx.values import Array

__all__ = ["Copies", "Copy"]


@dataclass(frozen=True)
class Copy:
    """What one instruction copies, [programs, threads].

    Attributes:
        address: in shared memory.
        values: bytes, [programs, threads, size].
        on: threads whose copy has not arrived.
        group: number of the group, of the thread's own, to which it belongs once that is committed.
    """

    address: Array
    values: Array
    on: Array
    group: Array


class Copies:
    """Those of some programs, in the order in which they began.

    Every thread commits what it has begun since its last commit as a group, and waits for groups.
    """

    def __init__(self, programs: int, threads: int) -> None:
        self._committed = np.zeros((programs, threads), np.int32)  # groups so far
        self._pending: list[Copy] = []

    def part(self, programs: Array) -> Copies:
        """Of some of the programs."""
        found = Copies(0, 0)
        found._committed = self._committed[programs]
        fields = ("address", "values", "on", "group")
        parts = (Copy(*(getattr(c, f)[programs] for f in fields)) for c in self._pending)
        found._pending = [c for c in parts if c.on.any()]
        return found

    def begin(self, address: Array, values: Array, on: Array) -> None:
        """Threads that are ``on`` copy."""
        if on.any():
            self._pending.append(Copy(address, values, on, self._committed.copy()))

    def commit(self, active: Array) -> None:
        """What the active threads have begun is a group each, if perhaps an empty one."""
        self._committed += active

    def arrive(self, active: Array, newest: int | None) -> list[Copy]:
        """What the active threads wait for, on its way no more: all but their ``newest`` groups and
        what is in none; for None, everything."""
        found, left = [], []
        for copy in self._pending:
            here = copy.on & active
            if newest is not None:
                here &= copy.group < self._committed - newest
            if not here.any():
                left.append(copy)
                continue
            found.append(replace(copy, on=here))
            if (rest := copy.on & ~here).any():
                left.append(replace(copy, on=rest))
        self._pending = left
        return found
