"""Operands of an instruction, looked up once, before a kernel runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.lab.ptx.machine import SPECIAL, Group
from bench.lab.ptx.parse import Instruction, Kernel
from bench.lab.ptx.values import Array, immediate, packed, unsigned, width

__all__ = ["Operands", "Source", "Target", "names"]

#: The register that an operand is in a group, [programs or 1, threads or 1].
Source = Callable[[Group], Array]
#: Puts a register where an operand says, in the threads for which the instruction runs.
Target = Callable[[Group, Array], None]

_EVERYWHERE = np.ones((1, 1), np.bool_)


def names(text: str) -> list[str]:
    """The parts of ``{a, b}``; of anything else, itself."""
    return [name.strip() for name in text.strip("{}").split(",")]


class Operands:
    """Those of one instruction of a kernel.

    Attributes:
        base, modifiers: its opcode, and what follows that after dots.
        written: the operands as text.
    """

    def __init__(self, kernel: Kernel, instruction: Instruction) -> None:
        self._kernel, self._instruction = kernel, instruction
        self.opcode, self.written = instruction.opcode, instruction.operands
        self.base, *self.modifiers = instruction.opcode.split(".")

    def active(self, group: Group) -> Array:
        """The threads in which the instruction runs."""
        predicate = self._instruction.predicate
        if not predicate:
            return _EVERYWHERE if group.mask is None else group.mask
        here = group.registers[predicate] ^ self._instruction.negated
        return here if group.mask is None else here & group.mask

    def source(self, text: str, kind: str) -> Source:
        """An operand that is read as a type: a register, a literal, the address of shared memory,
        or the parts of a register."""
        if text[0] == "{":
            each = f"b{width(kind) // len(names(text))}"
            parts = [self.source(part, each) for part in names(text)]
            return lambda group: packed([part(group) for part in parts], width(kind))
        if text[0] == "!":
            plain = self.source(text[1:], kind)
            return lambda group: ~plain(group)
        symbol, _, offset = text.partition("+")
        if symbol in self._kernel.shared:  # what a launch asks for; it begins at 0
            text = offset or "0"
        if text[0].isdigit() or text[0] == "-":
            value = immediate(text, kind)
            return lambda group: value
        if text in SPECIAL:
            return lambda group: group.registers[text]
        unwritten = _unwritten(width(self._kernel.kind(text)))
        return lambda group: group.registers.get(text, unwritten)

    def address(self, text: str) -> Source:
        """``[register + offset]``."""
        base, _, offset = text.strip("[]").replace(" ", "").partition("+")
        register = self.source(base, "b64")
        if not offset:
            return register
        away = int(offset, 0)

        def found(group: Group) -> Array:
            begin = register(group)
            return begin + begin.dtype.type(away % (1 << 8 * begin.dtype.itemsize))

        return found

    def target(self, text: str) -> Target:
        """An operand that is written: a register, the parts of one, or ``_`` for none."""
        if text == "_":
            return lambda group, value: None
        if text[0] == "{":
            parts = [self.target(name) for name in names(text)]

            def spread(group: Group, value: Array) -> None:
                each = 8 * value.dtype.itemsize // len(parts)
                for i, part in enumerate(parts):
                    part(group, (value >> value.dtype.type(i * each)).astype(unsigned(each)))

            return spread
        bits = width(self._kernel.kind(text))
        kind, unwritten = unsigned(bits), _unwritten(bits)

        def assigned(group: Group, value: Array) -> None:
            value = value.astype(kind, copy=False)
            if self._instruction.predicate or group.mask is not None:
                before = group.registers.get(text, unwritten)
                value = np.where(self.active(group), value, before)
            group.registers[text] = value

        return assigned


def _unwritten(bits: int) -> Array:
    """A register that nothing has written: all ones, a NaN."""
    if bits == 1:
        return np.zeros((1, 1), np.bool_)
    return np.full((1, 1), (1 << bits) - 1, unsigned(bits))
