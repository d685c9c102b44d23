"""The loops of machine code: how many instructions a byte takes, and how often it is waited for.

A kernel that moves bytes can wait for its own instructions instead. How fast a GPU issues them is
known, so the ratio says how near a loop is to that limit, before any GPU has run it. Or it has too
few bytes on their way: what is loaded arrives late, and the first instruction that needs it waits.
Instructions are issued in order, so their order says how much is loaded before such a wait.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Loop", "access_bits", "loops"]

# Bytes of a thread. A loop of fewer waits for other programs; code around loops that moves fewer
# prepares for them, once.
LEAST_LOOP, LEAST_AROUND = 32, 128
MOST_TURNS = 64  # until the turns of a loop repeat themselves


@dataclass(frozen=True)
class Loop:
    """One turn of an innermost loop, the shortest way through it; or all code outside of them.

    Attributes:
        instructions: of a thread.
        bytes: that a thread loads from global memory and stores there.
        loaded: those of them that it loads, without what it loads to meet other programs.
        waits: how often it waits for memory, one wait after the other; less than once where turns
            share a wait, as those of a pipelined loop do.
        inner: whether it is a loop.
    """

    instructions: int
    bytes: int
    loaded: int
    waits: float
    inner: bool


@dataclass(frozen=True)
class _Instruction:
    address: int
    name: str
    modifiers: str
    operands: str
    target: int | None  # of a branch
    predicated: bool
    named: frozenset[int]  # registers that it reads or writes
    loaded: frozenset[int]  # those that it loads from global memory


def loops(sass: str) -> tuple[Loop, ...]:
    """The innermost loops of a kernel, then the code around them, where they move
    data."""
    code = _parse(sass)
    places = {each.address: i for i, each in enumerate(code)}
    backward = {
        (places[each.target], i)
        for i, each in enumerate(code)
        if each.target in places and places[each.target] < i
    }
    inner = [
        (head, tail)
        for head, tail in backward
        if not any((a, b) != (head, tail) and head <= a and b <= tail for a, b in backward)
    ]
    inside = {i for head, tail in inner for i in range(head, tail + 1)}
    ways = [(_shortest(code, places, *ends), True) for ends in sorted(inner)]
    ways.append(([i for i in range(len(code)) if i not in inside], False))
    found = (_loop([code[i] for i in way], is_loop) for way, is_loop in ways)
    return tuple(
        loop for loop in found if loop.bytes >= (LEAST_LOOP if loop.inner else LEAST_AROUND)
    )


def _loop(way: Sequence[_Instruction], inner: bool) -> Loop:
    moving = [each for each in way if each.name in ("LDG", "LDGSTS", "STG")]
    loading = [each for each in moving if each.name != "STG" and not _meets(each.modifiers)]
    moved, loaded = (
        sum(access_bits(each.modifiers) // 8 for each in some) for some in (moving, loading)
    )
    return Loop(len(way), moved, loaded, _waits(way, inner), inner)


def access_bits(modifiers: str) -> int:
    """Bits of a load or store by its modifiers (``.E.128``)."""
    for part in modifiers.split("."):
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32


def _parse(sass: str) -> list[_Instruction]:
    found = []
    for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE):
        parts = re.match(r"(@!?U?P\w+\s+)?([A-Z0-9_]+)((?:\.\w+)*)(.*)", text)
        if parts is None or parts[2] == "NOP":
            continue
        _, name, modifiers, operands = parts.groups()
        to = re.search(r"0x([0-9a-f]+)\s*$", operands) if name == "BRA" else None
        memory = name.startswith(("LD", "ST", "ATOM", "RED"))
        # 256 bits name two registers, each the first of four.
        vector = min(4, max(1, access_bits(modifiers) // 32)) if memory else 1
        data = operands.partition("[")[0] if name == "LDG" and not _meets(modifiers) else ""
        found.append(
            _Instruction(
                address=int(address, 16),
                name=name,
                modifiers=modifiers,
                operands=operands,
                target=int(to[1], 16) if to else None,
                predicated=parts[1] is not None,
                named=_registers(operands, vector),
                loaded=_registers(data, vector),
            )
        )
    return found


def _meets(modifiers: str) -> bool:
    """Whether a load is one of those by which programs meet, and takes as long as they do."""
    return "STRONG" in modifiers


def _shortest(
    code: Sequence[_Instruction], places: dict[int, int], head: int, tail: int
) -> list[int]:
    """The fewest instructions from the head of a loop to its end, in order: what one turn takes but
    for blocks that only some turns enter, as the first does."""
    before: dict[int, tuple[int, int | None]] = {head: (1, None)}
    for i in range(head, tail):
        if i not in before:
            continue
        each, steps = code[i], before[i][0] + 1
        follows = [] if each.name in ("BRA", "EXIT") and not each.predicated else [i + 1]
        if each.target is not None and i < places.get(each.target, i) <= tail:
            follows.append(places[each.target])
        for j in follows:
            if j not in before or steps < before[j][0]:
                before[j] = (steps, i)
    way: list[int] = []
    at: int | None = tail if tail in before else None
    while at is not None:
        way.append(at)
        at = before[at][1]
    return way[::-1]


@dataclass
class _OnTheWay:
    """What a warp has asked memory for, as it goes through instructions.

    Only waits take time, and memory always takes as long: with what a warp waits for arrives
    everything else that it has asked for.

    Attributes:
        waits: so far.
        registers: that loads will write.
        copies: whether any to shared memory are on their way that belong to no group yet.
        groups: whether those of each group are, from the first group to the last.
    """

    waits: int = 0
    registers: set[int] = field(default_factory=set)
    copies: bool = False
    groups: list[bool] = field(default_factory=list)

    @property
    def state(self) -> tuple[object, ...]:
        return frozenset(self.registers), self.copies, tuple(self.groups)

    def go(self, way: Sequence[_Instruction]) -> None:
        for each in way:
            if not self.registers.isdisjoint(each.named):
                self._wait()
            self.registers |= each.loaded
            if each.name == "LDGSTS":
                self.copies = True
            elif each.name == "LDGDEPBAR":
                self.groups.append(self.copies)
                self.copies = False
            elif most := re.match(r"\s*SB0, 0x([0-9a-f]+)", each.operands):  # of DEPBAR.LE
                surplus = max(0, len(self.groups) - int(most[1], 16))
                if any(self.groups[:surplus]):
                    self._wait()

    def _wait(self) -> None:
        self.waits += 1
        self.registers.clear()
        self.copies = False
        self.groups.clear()


def _waits(way: Sequence[_Instruction], loop: bool) -> float:
    """How often a warp waits on its way; of a loop, in one of the turns that repeat themselves."""
    memory = _OnTheWay()
    seen: dict[tuple[object, ...], tuple[int, int]] = {}
    for turn in range(MOST_TURNS if loop else 1):
        if memory.state in seen:
            before, waits = seen[memory.state]
            return (memory.waits - waits) / (turn - before)
        seen[memory.state] = turn, memory.waits
        memory.go(way)
    return memory.waits / len(seen)


def _registers(operands: str, vector: int) -> frozenset[int]:
    """The registers that operands name: of data so many in a row, of a wide address two."""
    found: set[int] = set()
    for part in re.split(r"(\[.*?\])", operands):
        for number, wide in re.findall(r"\bR(\d+)(\.64)?", part):
            count = 2 if wide else 1 if part.startswith("[") else vector
            found.update(range(int(number), int(number) + count))
    return frozenset(found)
