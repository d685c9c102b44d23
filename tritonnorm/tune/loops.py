"""The loops of machine code: how many instructions a byte takes.

A kernel that moves bytes can wait for its own instructions instead. How fast a GPU issues them is
known, so the ratio says how near a loop is to that limit, before any GPU has run it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Loop", "access_bits", "loops"]

# Bytes of a thread. A loop of fewer waits for other programs; code around loops that moves fewer
# prepares for them, once.
LEAST_LOOP, LEAST_AROUND = 32, 128


@dataclass(frozen=True)
class Loop:
    """One turn of an innermost loop, the shortest way through it; or all code outside of them.

    Attributes:
        instructions: of a thread.
        bytes: that a thread loads from global memory and stores there.
        inner: whether it is a loop.
    """

    instructions: int
    bytes: int
    inner: bool


@dataclass(frozen=True)
class _Instruction:
    address: int
    name: str
    modifiers: str
    target: int | None  # of a branch
    predicated: bool


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
    found = [
        Loop(len(way), sum(_bytes(code[i]) for i in way), is_loop) for way, is_loop in ways if way
    ]
    return tuple(
        loop for loop in found if loop.bytes >= (LEAST_LOOP if loop.inner else LEAST_AROUND)
    )


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
        to = re.search(r"0x([0-9a-f]+)\s*$", parts[4]) if parts[2] == "BRA" else None
        target = int(to[1], 16) if to else None
        found.append(
            _Instruction(int(address, 16), parts[2], parts[3], target, parts[1] is not None)
        )
    return found


def _shortest(
    code: Sequence[_Instruction], places: dict[int, int], head: int, tail: int
) -> list[int]:
    """The fewest instructions from the head of a loop to its end: what one turn takes but for
    blocks that only some turns enter, as the first does."""
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
    return way


def _bytes(instruction: _Instruction) -> int:
    if instruction.name not in ("LDG", "STG"):
        return 0
    return access_bits(instruction.modifiers) // 8
