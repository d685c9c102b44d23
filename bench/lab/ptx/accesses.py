"""Instructions that touch memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.lab.ptx.machine import WARP, Group, Step
from bench.lab.ptx.memory import MemoryFault
from bench.lab.ptx.operands import Operands, names
from bench.lab.ptx.values import Array, bits_of, packed, typed, unsigned, width

__all__ = ["atomic", "copy", "load", "load_matrix", "reduction", "store", "store_matrix"]

_ATOMIC: dict[str, Callable[..., Any]] = {
    "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.minimum, "max": np.maximum, "exch": lambda old, new: new,
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
}  # fmt: skip


def _space(o: Operands) -> tuple[str, str, int]:
    """State space, type of an element, and how many of them a thread accesses."""
    spaces = [m.partition("::")[0] for m in o.modifiers]
    space = next((m for m in spaces if m in ("param", "global", "shared", "local")), "global")
    if space == "local":
        raise NotImplementedError("local memory")
    counts = [int(m[1:]) for m in o.modifiers if m in ("v2", "v4", "v8")]
    return space, o.modifiers[-1], counts[0] if counts else 1


def _check_aligned(where: Array, active: Array, size: int) -> None:
    if ((where % where.dtype.type(size) != 0) & active).any():
        raise MemoryFault(f"an access of {size} bytes is not aligned to them")


def _evict_first(o: Operands) -> Callable[[Group], bool]:
    """Whether what is accessed is to leave the cache before all else."""
    if "cache_hint" not in " ".join(o.modifiers):
        return lambda group: False
    policy = o.source(o.written[-1], "b64")
    return lambda group: bool(policy(group).all())


def load(o: Operands) -> Step:
    """``ld``; a parameter is a register that is there from the start."""
    space, kind, count = _space(o)
    if space == "param":
        name, target = o.written[1].strip("[]"), o.target(o.written[0])
        return lambda group: target(group, group.registers[name])
    targets, address = [o.target(name) for name in names(o.written[0])], o.address(o.written[1])
    size = width(kind) // 8
    read, first = _from_global if space == "global" else _from_shared, _evict_first(o)
    assert len(targets) == count

    def step(group: Group) -> None:
        where, active = address(group), o.active(group)
        _check_aligned(where, active, count * size)
        if space == "global":
            wide = group.wide(where), group.wide(active)
            group.counts.request("ld", *wide, count * size, first(group))
        for i, target in enumerate(targets):
            found = read(group, where + where.dtype.type(i * size), active, 8 * size)
            target(group, typed(found, kind) if kind[0] == "s" else found)

    return step


def _from_global(group: Group, where: Array, active: Array, bits: int) -> Array:
    where, active = np.broadcast_arrays(where, active)
    return group.memory.load(where.ravel(), active.ravel(), bits).reshape(where.shape)


def _from_shared(group: Group, where: Array, active: Array, bits: int) -> Array:
    on, (program, warp) = group.wide(active), group.places
    found = np.zeros(on.shape, unsigned(bits))
    found[on] = group.shared.load(program[on], warp[on], group.wide(where)[on], bits)
    return found


def store(o: Operands) -> Step:
    """``st``."""
    space, kind, count = _space(o)
    sources = [o.source(name, kind) for name in names(o.written[1])]
    address, size, first = o.address(o.written[0]), width(kind) // 8, _evict_first(o)
    assert len(sources) == count

    def step(group: Group) -> None:
        where, on = group.wide(address(group)), group.wide(o.active(group))
        _check_aligned(where, on, count * size)
        if space == "global":
            group.counts.request("st", where, on, count * size, first(group))
        for i, source in enumerate(sources):
            at = where[on] + where.dtype.type(i * size)
            values = group.wide(source(group).astype(unsigned(8 * size)))[on]
            if space == "global":
                group.memory.store(at, np.ones(at.shape, np.bool_), values)
            else:
                program, warp = group.places
                group.shared.store(program[on], warp[on], at, values)
        group.progress += 1

    return step


def copy(o: Operands) -> Step:
    """``cp.async`` and what it is waited for with."""
    others = {"ca": _begin_copy, "cg": _begin_copy, "commit_group": _commit, "wait_group": _wait,
              "wait_all": _wait}  # fmt: skip
    return others[o.modifiers[1]](o)


def _begin_copy(o: Operands) -> Step:
    """Some of the bytes may be read, and the others are zeros. None arrives before it is waited
    for."""
    hinted = "L2::cache_hint" in o.modifiers
    to, come_from, most, *read = o.written[:-1] if hinted else o.written
    address, origin, size = o.address(to), o.address(come_from), int(most, 0)
    asked, first = o.source((read or [most])[0], "b32"), _evict_first(o)

    def step(group: Group) -> None:
        where, there = group.wide(address(group)), group.wide(origin(group))
        on, bytes_read = group.wide(o.active(group)), group.wide(asked(group))
        if (on & (bytes_read > size)).any():
            raise MemoryFault(f"a copy of {size} bytes reads more")
        _check_aligned(there, on, size)
        bytes_read = np.where(on, bytes_read, 0)
        for each in np.unique(bytes_read[bytes_read > 0]).tolist():
            group.counts.request("ld", there, bytes_read == each, each, first(group))
        program, warp = group.places
        group.shared.expect(program[on], warp[on], where[on], size)
        group.copies.begin(where, _with_zeros(group, there, bytes_read, size), on)

    return step


def _with_zeros(group: Group, where: Array, read: Array, size: int) -> Array:
    """The bytes at addresses as far as they are read, [programs, threads, size]."""
    unit = 1 if (read % min(size, 8)).any() else min(size, 8)
    units = [
        _from_global(group, where + where.dtype.type(i), read > i, 8 * unit)
        for i in range(0, size, unit)
    ]
    return np.stack(units, axis=-1).view(np.uint8)


def _commit(o: Operands) -> Step:
    return lambda group: group.copies.commit(o.active(group))


def _wait(o: Operands) -> Step:
    """What arrives is written as by the warp that began to copy it."""
    newest = int(o.written[0], 0) if o.written else None

    def step(group: Group) -> None:
        program, warp = group.places
        for found in group.copies.arrive(o.active(group), newest):
            on = found.on
            group.shared.arrive(program[on], warp[on], found.address[on], found.values[on])

    return step


def atomic(o: Operands) -> Step:
    """``atom``: the value before is the result."""
    return _atomic(o, *o.written)


def reduction(o: Operands) -> Step:
    """``red``: an ``atom`` without a result."""
    return _atomic(o, "_", *o.written)


def _atomic(o: Operands, result: str, place: str, *operands: str) -> Step:
    space, kind, _ = _space(o)
    if space != "global":
        raise NotImplementedError("atomics in shared memory")
    change = _ATOMIC[next(m for m in o.modifiers if m in _ATOMIC)]
    target, address = o.target(result), o.address(place)
    sources = [o.source(text, kind) for text in operands]

    def step(group: Group) -> None:
        where, on = group.wide(address(group)), group.wide(o.active(group))
        values = [typed(group.wide(source(group)), kind) for source in sources]
        found = np.zeros(on.shape, unsigned(width(kind)))
        one = np.ones(1, np.bool_)
        for lane in zip(*np.nonzero(on), strict=True):  # one after another
            at = where[lane].reshape(1)
            old = group.memory.load(at, one, width(kind))
            new = change(typed(old, kind), *(v[lane].reshape(1) for v in values))
            group.memory.store(at, one, bits_of(new, kind))
            found[lane] = old[0]
        target(group, found)
        group.progress += int(on.any())

    return step


def _matrix(group: Group, where: Array, i: int, across: bool) -> list[Array]:
    """Where the two values of every thread lie in the i-th 8 x 8 matrix of 16 bits. Eight threads
    of a warp tell where its rows begin."""
    lane = np.arange(WARP)
    rows = where.reshape(len(where), -1, WARP)[:, :, 8 * i : 8 * i + 8]
    found = []
    for pair in (0, 1):
        row, column = lane // 4, 2 * (lane % 4) + pair
        if across:
            row, column = column, row
        at = rows[:, :, row] + (2 * column).astype(where.dtype)
        found.append(at.reshape(where.shape))
    return found


def _matrix_operands(o: Operands) -> bool:
    if "shared" not in o.modifiers or o.modifiers[-1] != "b16":
        raise NotImplementedError(o.opcode)
    return "trans" in o.modifiers


def load_matrix(o: Operands) -> Step:
    """``ldmatrix``."""
    across, address = _matrix_operands(o), o.address(o.written[1])
    targets = [o.target(name) for name in names(o.written[0])]

    def step(group: Group) -> None:
        where, active = group.wide(address(group)), o.active(group)
        for i, target in enumerate(targets):
            places = _matrix(group, where, i, across)
            halves = [_from_shared(group, at, active, 16) for at in places]
            target(group, packed(halves, 32))

    return step


def store_matrix(o: Operands) -> Step:
    """``stmatrix``."""
    across, address = _matrix_operands(o), o.address(o.written[0])
    sources = [o.source(name, "b32") for name in names(o.written[1])]

    def step(group: Group) -> None:
        where, on = group.wide(address(group)), group.wide(o.active(group))
        program, warp = group.places
        for i, source in enumerate(sources):
            value = group.wide(source(group))
            for pair, at in enumerate(_matrix(group, where, i, across)):
                half = (value >> np.uint32(16 * pair)).astype(np.uint16)
                group.shared.store(program[on], warp[on], at[on], half[on])
        group.progress += 1

    return step
