"""PTX text to instructions."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

__all__ = ["Instruction", "Kernel", "parse"]

_IGNORED = re.compile(r"//[^\n]*|^[ \t]*\.(?:loc|pragma|file)\b[^\n]*", re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)")
_SHARED = re.compile(r"\.shared[^;]*?\.b8\s+([\w$]+)\[\]")
_PART = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+):|"
    r"\.reg\s+\.(?P<kind>\w+)\s+(?P<names>[^;]+);|(?P<statement>[^;]+);)"
)
_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{\[][^,]*")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with all that follows it after dots.
        operands: as written; destination first.
        predicate: register that guards it, or "".
        negated: it runs where the predicate is false.
        line: in the text, from 1.
    """

    opcode: str
    operands: tuple[str, ...]
    predicate: str = ""
    negated: bool = False
    line: int = 0

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        return f"line {self.line}: {guard}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Kernel:
    """An entry of a module.

    Attributes:
        name: of the entry.
        parameters: name -> type, in order.
        shared: names of the module's shared memory, whose size the launch tells.
        instructions: of the body.
        labels: name -> index of the instruction that follows.
        registers: name, or prefix of numbered names -> type.
    """

    name: str
    parameters: dict[str, str]
    shared: list[str]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)

    def kind(self, register: str) -> str:
        """Declared type of a register, as b32 or pred."""
        return self.registers.get(register) or self.registers[register.rstrip("0123456789")]

    def rejoin(self, branch: int) -> int:
        """Where all paths from a branch meet again: its nearest post-dominator; the end of the code
        is one."""
        after = self._post_dominators[branch] - {branch}
        return next(i for i in after if self._post_dominators[i] == after)

    @functools.cached_property
    def _post_dominators(self) -> list[frozenset[int]]:
        """What every path from an instruction to the end passes, itself included."""
        end = len(self.instructions)
        found = [frozenset(range(end + 1))] * end + [frozenset({end})]
        changed = True
        while changed:
            changed = False
            for i in reversed(range(end)):
                now = frozenset.intersection(*(found[n] for n in self._next(i))) | {i}
                changed, found[i] = changed or now != found[i], now
        return found

    def _next(self, i: int) -> list[int]:
        """What may run after an instruction."""
        instruction = self.instructions[i]
        base = instruction.opcode.partition(".")[0]
        if base in ("ret", "exit"):
            return [len(self.instructions)]
        if base != "bra":
            return [i + 1]
        target = self.labels[instruction.operands[0]]
        return [target, i + 1] if instruction.predicate else [target]


def parse(text: str) -> Kernel:
    """The entry of a module of one kernel.

    Raises:
        ValueError: the text has no entry, or a statement that is not understood.
    """
    text = _IGNORED.sub("", text)
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError("text: no .entry in it")
    kernel = Kernel(
        entry[1], {n: t for t, n in _PARAMETER.findall(entry[2])}, _SHARED.findall(text)
    )
    at, line, scopes = entry.end(), 1 + text.count("\n", 0, entry.end()), 1
    while scopes:
        part = _PART.match(text, at)
        if part is None:
            raise ValueError(f"text: line {line} is not understood")
        begins = line + text.count("\n", at, part.start(part.lastgroup or 0))
        scopes += (part["open"] is not None) - (part["close"] is not None)
        if part["label"]:
            kernel.labels[part["label"]] = len(kernel.instructions)
        elif part["names"]:
            names = (name.split("<")[0].strip() for name in part["names"].split(","))
            kernel.registers.update(dict.fromkeys(names, part["kind"]))
        elif part["statement"] and not part["statement"].startswith("."):
            kernel.instructions.append(_instruction(part["statement"], begins))
        line, at = line + text.count("\n", at, part.end()), part.end()
    return kernel


def _instruction(statement: str, line: int) -> Instruction:
    found = _STATEMENT.fullmatch(statement.strip())
    if found is None:
        raise ValueError(f"text: line {line} is not understood: {statement!r}")
    operands = tuple(o.strip() for o in _OPERAND.findall(found[4]))
    return Instruction(found[3], operands, found[2] or "", found[1] == "!", line)
