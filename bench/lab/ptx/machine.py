"""A grid of programs, in lock-step as long as their control flow agrees.

All programs start as one group. A branch that some take and others do not splits it; groups take
turns, so that programs may wait for each other. Where threads of one program part, one side runs
after the other, up to the place where all paths meet again (`parse.Kernel.rejoin`).
"""

from __future__ import annotations

import functools
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bench.lab.ptx.cache import SECTOR, Cache
from bench.lab.ptx.copies import Copies
from bench.lab.ptx.memory import GlobalMemory, MemoryFault, SharedMemory
from bench.lab.ptx.parse import Instruction, Kernel
from bench.lab.ptx.values import Array

__all__ = ["SPECIAL", "WARP", "Counts", "Group", "Step", "run"]

WARP = 32
TURN = 2000  # instructions, then another group has its turn
PATIENCE = 500  # turns of all groups without a store or an end: they wait for ever

#: Runs an instruction on a group.
Step = Callable[["Group"], None]


@dataclass
class Counts:
    """What a launch did.

    Attributes:
        instructions: executed by warps, predicated off or not.
        requests: of warps to global memory, by instruction ("ld" or "st") and bytes per thread.
        sectors: of 32 bytes that these touch, likewise.
        moved: bytes that the active threads asked for, likewise.
        cache: that all of it goes through, if any.
    """

    instructions: int = 0
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    sectors: Counter[tuple[str, int]] = field(default_factory=Counter)
    moved: Counter[tuple[str, int]] = field(default_factory=Counter)
    cache: Cache | None = None

    def request(
        self, what: str, addresses: Array, active: Array, size: int, evict_first: bool = False
    ) -> None:
        """Count an access of all threads, [programs, threads]; each is aligned to its size."""
        lanes, on = addresses.reshape(-1, WARP), active.reshape(-1, WARP)
        sectors = np.sort(np.where(on, lanes // np.uint64(SECTOR), np.uint64(0)), axis=1)
        fresh = (np.diff(sectors, axis=1, prepend=np.uint64(0)) != 0) & (sectors != 0)
        key = (what, size)
        self.requests[key] += int(on.any(axis=1).sum())
        self.sectors[key] += int(fresh.sum())
        self.moved[key] += int(on.sum()) * size
        if self.cache is not None:
            self.cache.access(sectors[fresh].tolist(), what == "st", evict_first)


@dataclass
class _Parted:
    """Threads of a program parted: where they meet, who runs from there, and sides still to run."""

    rejoin: int
    mask: Array | None
    sides: list[tuple[int, Array]]


class Group:
    """Programs with the same place in the code.

    Attributes:
        programs: their numbers in the grid.
        registers: name -> array [programs or 1, threads or 1].
        copies: to shared memory that are on their way.
    """

    def __init__(
        self,
        programs: Array,
        threads: int,
        constants: dict[str, Array],
        shared: SharedMemory,
        memory: GlobalMemory,
        counts: Counts,
    ) -> None:
        self.programs, self.threads, self.shared, self.memory = programs, threads, shared, memory
        self.registers = dict(constants)
        self.counts = counts
        self.copies = Copies(len(programs), threads)
        self.pc = 0
        self.progress = 0  # stores so far
        self.mask: Array | None = None  # threads that run, while some of a program do not
        self.parted: list[_Parted] = []

    def part(self, chosen: Array) -> Group:
        """The programs of the group that ``chosen`` [programs] picks, at the same place."""
        own = {n: a[chosen] if len(a) > 1 else a for n, a in self.registers.items()}
        found = Group(
            self.programs[chosen], self.threads, own, self.shared.part(chosen), self.memory,
            self.counts,
        )  # fmt: skip
        found.copies = self.copies.part(chosen)
        found.pc, found.progress = self.pc, self.progress
        return found

    def wide(self, register: Array) -> Array:
        """A register with both axes at their full length."""
        return np.broadcast_to(register, (len(self.programs), self.threads))

    @functools.cached_property
    def places(self) -> tuple[Array, Array]:
        """Program, of this group, and warp of every thread."""
        programs, warps = np.arange(len(self.programs)), np.arange(self.threads) // WARP
        return self.wide(programs[:, None]), self.wide(warps[None, :].astype(np.int16))


def run(
    kernel: Kernel,
    steps: list[Step],
    arguments: dict[str, Array],
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    memory: GlobalMemory,
    at_once: int = 1 << 16,
    cache: Cache | None = None,
) -> Counts:
    """Run a grid to its end.

    Args:
        kernel: what `parse` read.
        steps: its instructions, as `instructions.steps_of` makes them.
        arguments: parameter name -> register.
        grid: programs in three dimensions.
        threads: of a program.
        shared_bytes: of a program.
        memory: what it may access.
        at_once: threads that are simulated together, unless more programs must meet.
        cache: sees every access to global memory.

    Raises:
        MemoryFault: it accesses memory that it must not.
        RuntimeError: programs wait for each other for ever, or threads part ways.
    """
    count, counts = math.prod(grid), Counts(cache=cache)
    meets = any(i.opcode.startswith(("atom", "red")) for i in kernel.instructions)
    share = count if meets else max(1, at_once // threads)
    for first in range(0, count, share):
        programs = np.arange(first, min(first + share, count))
        constants = arguments | _special(programs, grid, threads)
        shared = SharedMemory(len(programs), shared_bytes)
        group = Group(programs, threads, constants, shared, memory, counts)
        _finish(kernel, steps, group)
    return counts


def _special(programs: Array, grid: tuple[int, int, int], threads: int) -> dict[str, Array]:
    """The registers that tell a thread where it is."""
    x, y, z = grid
    rows, ids = programs[:, None].astype(np.uint32), np.arange(threads, dtype=np.uint32)[None, :]
    found = {
        "%ctaid.x": rows % np.uint32(x),
        "%ctaid.y": rows // np.uint32(x) % np.uint32(y),
        "%ctaid.z": rows // np.uint32(x * y),
        "%tid.x": ids,
        "%laneid": ids % np.uint32(WARP),
        "%warpid": ids // np.uint32(WARP),
    }
    sizes = {"%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z, "%ntid.x": threads, "%tid.y": 0,
             "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1, "WARP_SZ": WARP}  # fmt: skip
    return found | {n: np.full((1, 1), v, np.uint32) for n, v in sizes.items()}


def _finish(kernel: Kernel, steps: list[Step], group: Group) -> None:
    waiting, idle = deque([group]), 0
    while waiting:
        group = waiting.popleft()
        before = group.progress
        parts = _turn(kernel, steps, group)
        idle = idle + 1 if parts == [group] and group.progress == before else 0
        if idle > PATIENCE * (1 + len(waiting)):
            where = kernel.instructions[group.pc]
            raise RuntimeError(f"{kernel.name}: programs wait for ever at {where}")
        waiting.extend(parts)


def _turn(kernel: Kernel, steps: list[Step], group: Group) -> list[Group]:
    """Run a group until it ends (nothing is left), splits (its parts) or has had its turn."""
    instructions, warps = kernel.instructions, len(group.programs) * group.threads // WARP
    for _ in range(TURN):
        while group.parted and group.pc == group.parted[-1].rejoin:
            _rejoin(group)
        if group.pc >= len(steps):
            return []
        instruction = instructions[group.pc]
        group.counts.instructions += warps if group.mask is None else _warps(group.mask)
        base = instruction.opcode.partition(".")[0]
        if base == "bra":
            if parts := _branch(kernel, group, instruction):
                return parts
        elif base in ("ret", "exit"):
            if instruction.predicate:
                raise NotImplementedError(f"{kernel.name}: {instruction}")
            group.pc = len(steps)
        else:
            try:
                steps[group.pc](group)
            except MemoryFault as e:
                raise MemoryFault(f"{e}: {kernel.name}, {instruction}") from e
            group.pc += 1
    return [group]


def _warps(mask: Array) -> int:
    return int(mask.reshape(-1, WARP).any(axis=1).sum())


def _branch(kernel: Kernel, group: Group, instruction: Instruction) -> list[Group]:
    """Go where a branch leads; the parts if programs part."""
    target = kernel.labels[instruction.operands[0]]
    if not instruction.predicate:
        group.pc = target
        return []
    taken = group.wide(group.registers[instruction.predicate] ^ instruction.negated)
    running = taken if group.mask is None else taken[group.mask]
    if running.all() or not running.any():
        group.pc = target if running.any() else group.pc + 1
        return []
    if group.mask is None and (taken == taken[:, :1]).all():
        jump, stay = group.part(taken[:, 0]), group.part(~taken[:, 0])
        jump.pc, stay.pc = target, group.pc + 1
        return [jump, stay]
    everyone = np.ones_like(taken) if group.mask is None else group.mask
    side = group.pc + 1, everyone & ~taken
    group.parted.append(_Parted(kernel.rejoin(group.pc), group.mask, [side]))
    group.pc, group.mask = target, everyone & taken
    return []


def _rejoin(group: Group) -> None:
    """At the place where threads meet: the other side's turn, or all go on."""
    here = group.parted[-1]
    if here.sides:
        group.pc, group.mask = here.sides.pop()
    else:
        group.mask = here.mask
        group.parted.pop()


#: Names of registers that nothing has to write.
SPECIAL = frozenset(_special(np.zeros(1, np.int64), (1, 1, 1), WARP))
