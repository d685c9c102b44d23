"""Global memory that is a process's own tensors, shared memory of each program, and checks of both.

What an access may not do raises `MemoryFault`: outside of every tensor, misaligned, or in shared
memory that another warp writes or reads without a barrier between, or that a copy is on its way to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from bench.lab.ptx.values import Array, unsigned

__all__ = ["GlobalMemory", "MemoryFault", "SharedMemory"]

_ALIGNED = 16  # bytes: the widest access, and never across a page
_COMING = -2  # epoch of a write by a copy that is on its way


class MemoryFault(RuntimeError):
    """An access that a kernel must not make."""


class GlobalMemory:
    """The memory of some tensors, each from its first to its last element."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        spans = sorted(_span(t) for t in tensors if t.numel())
        merged: list[tuple[int, int]] = []
        for begin, end in spans:
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        self._begins = np.array([b for b, _ in merged], np.uint64)
        self._ends = np.array([e for _, e in merged], np.uint64)
        self._bases, self._bytes = [], []
        for begin, end in merged:
            base, most = begin // _ALIGNED * _ALIGNED, -(-end // _ALIGNED) * _ALIGNED
            raw: Any = (ctypes.c_uint8 * (most - base)).from_address(base)
            self._bases.append(np.uint64(base))
            self._bytes.append(np.frombuffer(raw, np.uint8))

    def load(self, addresses: Array, active: Array, bits: int) -> Array:
        """Values at addresses, [lanes]; 0 where a lane is not active."""
        found = np.zeros(addresses.shape, unsigned(bits))
        for i, where in self._placed(addresses, active, bits // 8):
            found[where] = self._view(i, bits)[self._index(i, addresses[where], bits)]
        return found

    def store(self, addresses: Array, active: Array, values: Array) -> None:
        """Write the values of the active lanes, [lanes]; of equal addresses the last lane's."""
        bits = 8 * values.dtype.itemsize
        for i, where in self._placed(addresses, active, bits // 8):
            self._view(i, bits)[self._index(i, addresses[where], bits)] = values[where]

    def _view(self, i: int, bits: int) -> Array:
        return self._bytes[i].view(unsigned(bits))

    def _index(self, i: int, addresses: Array, bits: int) -> Array:
        return ((addresses - self._bases[i]) // np.uint64(bits // 8)).astype(np.int64)

    def _placed(self, addresses: Array, active: Array, size: int) -> Iterable[tuple[int, Array]]:
        """The pieces of memory that the active lanes touch, each with its lanes."""
        if not active.any():
            return
        touched = addresses[active]
        piece = np.searchsorted(self._begins, touched, side="right").astype(np.int64) - 1
        inside = piece >= 0
        inside &= touched + np.uint64(size) <= self._ends[np.maximum(piece, 0)]
        if not inside.all():
            wrong = int(touched[~inside][0])
            raise MemoryFault(f"{size} bytes at {wrong:#x} are in no tensor{self._near(wrong)}")
        for i in np.unique(piece):
            where = active.copy()
            where[active] = piece == i
            yield int(i), where

    def _near(self, address: int) -> str:
        if not len(self._ends):
            return ""
        gaps = [(address - int(e), int(e)) for e in self._ends if address >= e]
        return f": {min(gaps)[0]} bytes after the end of one" if gaps else ""


def _span(t: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class SharedMemory:
    """Shared memory of programs, and who touched which byte of it since the last barrier.

    Warps of a program are ordered only by barriers: a byte that one warp writes must not be read or
    changed by another before both have met. Where a copy is on its way to, none has access.
    """

    def __init__(self, programs: int, size: int) -> None:
        self.size = -(-size // _ALIGNED) * _ALIGNED
        shape = (programs, self.size)
        self._bytes = np.full(shape, 0xFF, np.uint8)  # NaN, until it is written
        self._epoch = np.zeros(programs, np.int32)
        # Warp and epoch of the last write and read; -1 never, and -2 for several readers.
        self._writer, self._written = np.full(shape, -1, np.int16), np.full(shape, -1, np.int32)
        self._reader, self._read = np.full(shape, -1, np.int16), np.full(shape, -1, np.int32)

    def part(self, programs: Array) -> SharedMemory:
        """Of some of the programs."""
        found = object.__new__(SharedMemory)
        found.size = self.size
        for name in ("_bytes", "_epoch", "_writer", "_written", "_reader", "_read"):
            setattr(found, name, getattr(self, name)[programs].copy())
        return found

    def barrier(self) -> None:
        """All warps of the programs have met."""
        self._epoch += 1

    def load(self, program: Array, warp: Array, address: Array, bits: int) -> Array:
        """Values at addresses. All arguments are [lanes], of active lanes only."""
        at, who, now = self._touched(program, warp, address, bits // 8)
        writer, written = self._writer.ravel()[at], self._written.ravel()[at]
        if (written == _COMING).any():
            raise MemoryFault("a warp reads what has not arrived")
        if ((written == now) & (writer != who)).any():
            raise MemoryFault("a warp reads what another wrote, without a barrier between")
        reader, read = self._reader.reshape(-1), self._read.reshape(-1)
        reader[at] = np.where((read[at] == now) & (reader[at] != who), -2, who)
        reader[at[reader[at] != who]] = -2  # several warps of this very instruction
        read[at] = now
        return self._bytes.reshape(-1)[at].reshape(-1, bits // 8).view(unsigned(bits))[:, 0]

    def store(self, program: Array, warp: Array, address: Array, values: Array) -> None:
        """Write values. All arguments are [lanes], of active lanes only."""
        at, who, now = self._touched(program, warp, address, values.dtype.itemsize)
        parts = np.ascontiguousarray(values)[:, None].view(np.uint8).reshape(-1)
        self._check_change(at, who, now, self._bytes.reshape(-1)[at] != parts)
        self._write(at, who, now, parts)

    def expect(self, program: Array, warp: Array, address: Array, size: int) -> None:
        """Copies of ``size`` bytes begin. All other arguments are [lanes], of active lanes only."""
        at, who, now = self._touched(program, warp, address, size)
        self._check_change(at, who, now, np.ones(at.shape, np.bool_))
        self._written.reshape(-1)[at] = _COMING

    def arrive(self, program: Array, warp: Array, address: Array, values: Array) -> None:
        """What copies bring, [lanes, bytes]. The others are [lanes], of active lanes only."""
        touched = self._touched(program, warp, address, values.shape[1])
        self._write(*touched, values.reshape(-1))

    def _check_change(self, at: Array, who: Array, now: Array, differs: Array) -> None:
        """Whether warps may change bytes, where what they write differs."""
        writer, written = self._writer.reshape(-1)[at], self._written.reshape(-1)[at]
        reader, read = self._reader.reshape(-1)[at], self._read.reshape(-1)[at]
        if (written == _COMING).any():
            raise MemoryFault("a warp writes where a copy is on its way to")
        if ((read == now) & (reader != who)).any():
            raise MemoryFault("a warp writes what another read, without a barrier between")
        if ((written == now) & (writer != who) & differs).any():
            raise MemoryFault("a warp writes what another wrote, without a barrier between")

    def _write(self, at: Array, who: Array, now: Array, parts: Array) -> None:
        memory = self._bytes.reshape(-1)
        memory[at] = parts
        if (memory[at] != parts).any():
            raise MemoryFault("threads write different values to one place at once")
        self._writer.reshape(-1)[at], self._written.reshape(-1)[at] = who, now

    def _touched(
        self, program: Array, warp: Array, address: Array, size: int
    ) -> tuple[Array, Array, Array]:
        """Index, warp and epoch of every byte."""
        if (address % size).any():
            raise MemoryFault(f"shared memory is accessed by {size} bytes at {address[0]:#x}")
        if (address.astype(np.int64) + size > self.size).any():
            raise MemoryFault(f"byte {int(address.max())} of {self.size} bytes of shared memory")
        first = program.astype(np.int64) * self.size + address.astype(np.int64)
        at = (first[:, None] + np.arange(size)).reshape(-1)
        return at, np.repeat(warp, size), np.repeat(self._epoch[program], size)
