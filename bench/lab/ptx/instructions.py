"""Instructions to functions that a machine runs on a group of programs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.lab.ptx import accesses
from bench.lab.ptx.arithmetic import looked_up, operation
from bench.lab.ptx.machine import WARP, Group, Step
from bench.lab.ptx.memory import MemoryFault
from bench.lab.ptx.operands import Operands
from bench.lab.ptx.parse import Instruction, Kernel
from bench.lab.ptx.values import bits_of, typed

__all__ = ["steps_of"]


def steps_of(kernel: Kernel) -> list[Step]:
    """Each instruction of a kernel as a function.

    Raises:
        NotImplementedError: for an instruction that no kernel has needed so far.
    """
    return [_step(kernel, instruction) for instruction in kernel.instructions]


def _step(kernel: Kernel, instruction: Instruction) -> Step:
    operands = Operands(kernel, instruction)
    make = _OTHERS.get(operands.base, _calculate)
    try:
        return make(operands)
    except (NotImplementedError, KeyError) as e:
        raise NotImplementedError(f"{kernel.name}: {instruction}") from e


def _nothing(o: Operands) -> Step:
    """Control flow, which the machine does by itself, and order of memory, which is kept here."""
    return lambda group: None


def _calculate(o: Operands) -> Step:
    """A function of registers, and perhaps its negation as a second result."""
    where, *others = o.written
    known = looked_up(int(others.pop(), 0)) if o.base == "lop3" else operation(o.opcode)
    first, _, second = where.partition("|")
    target, negated = o.target(first), o.target(second or "_")
    sources = [(o.source(text, k), k) for text, k in zip(others, known.sources, strict=True)]

    def step(group: Group) -> None:
        values = (typed(source(group), kind) for source, kind in sources)
        found = bits_of(known.compute(*values), known.target)
        target(group, found)
        if second:
            negated(group, ~found)

    return step


def _mov(o: Operands) -> Step:
    target, source = o.target(o.written[0]), o.source(o.written[1], o.modifiers[-1])
    return lambda group: target(group, source(group))


def _createpolicy(o: Operands) -> Step:
    """A hint to a cache: here 1 for data that are to leave it first, else 0."""
    target, first = o.target(o.written[0]), "L2::evict_first" in o.modifiers
    return lambda group: target(group, np.full((1, 1), first, np.uint64))


def _barrier(o: Operands) -> Step:
    if "warp" in o.modifiers:  # the threads of a warp are never apart
        return _nothing(o)
    if o.written != ("0",):
        raise NotImplementedError("barriers other than of a whole program")

    def step(group: Group) -> None:
        if group.mask is not None:
            raise MemoryFault("a barrier where the threads of a program have parted")
        group.shared.barrier()

    return step


def _shuffle(o: Operands) -> Step:
    """Values from other threads of the warp, and whether there is such a thread."""
    mode = o.modifiers[1]
    where, _, valid = o.written[0].partition("|")
    target, inside = o.target(where), o.target(valid or "_")
    value, by, limits = (o.source(text, "b32") for text in o.written[1:4])

    def step(group: Group) -> None:
        own = np.arange(group.threads)[None, :] % WARP
        distance, limit = by(group).astype(np.int64) & 31, limits(group).astype(np.int64)
        segment = limit >> 8 & 31
        low, top = own & segment, own & segment | limit & 31 & ~segment
        if mode == "up":
            other, found = own - distance, own - distance >= top
        else:
            others = {"bfly": own ^ distance, "down": own + distance}
            other = others[mode] if mode in others else low | distance & ~segment
            found = other <= top
        lanes = group.wide(np.where(found, other, own)).reshape(len(group.programs), -1, WARP)
        values = group.wide(value(group)).reshape(lanes.shape)
        taken = np.take_along_axis(values, lanes, axis=2)
        target(group, taken.reshape(len(group.programs), group.threads))
        inside(group, group.wide(found))

    return step


def _reduce(o: Operands) -> Step:
    """``redux``: one value of all threads of a warp."""
    how, kind = o.modifiers[1], o.modifiers[-1]
    target, source = o.target(o.written[0]), o.source(o.written[1], kind)
    combine = {"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
               "min": np.minimum, "max": np.maximum}[how]  # fmt: skip

    def step(group: Group) -> None:
        values = typed(group.wide(source(group)), kind).reshape(len(group.programs), -1, WARP)
        found = combine.reduce(values, axis=2, keepdims=True, dtype=values.dtype)
        whole = np.broadcast_to(found, values.shape).reshape(len(group.programs), group.threads)
        target(group, bits_of(whole, kind))

    return step


_OTHERS: dict[str, Callable[[Operands], Step]] = {
    **dict.fromkeys(("bra", "ret", "exit", "membar", "fence", "griddepcontrol"), _nothing),
    "mov": _mov,
    "createpolicy": _createpolicy,
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": _shuffle,
    "redux": _reduce,
    "ld": accesses.load,
    "st": accesses.store,
    "atom": accesses.atomic,
    "red": accesses.reduction,
    "cp": accesses.copy,
    "ldmatrix": accesses.load_matrix,
    "stmatrix": accesses.store_matrix,
}
