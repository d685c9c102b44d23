"""Read resources and access widths out of compiled kernels."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonnorm.tune.loops import access_bits, loops

__all__ = ["Access", "amd_resources", "nvidia_resources"]


@dataclass(frozen=True)
class Access:
    """Global accesses of one width that one source line compiles to.

    Taken from PTX or AMD assembly. On NVIDIA a later stage can split or merge them, so the counts
    of a report's `loads` and `stores`, which come from the final code, need not be the same. With
    triton 3.9 the line of a vector access can lie a few lines behind the true one.
    """

    file: str
    line: int
    kind: str  # "load" or "store"
    bits: int
    count: int


def nvidia_resources(asm: Mapping[str, Any], disassemble: bool = True) -> dict[str, Any]:
    """Registers, stack, spills and accesses of a cubin, as keyword arguments of KernelReport.

    Disassembling takes a second. Without it loads and stores are counted in PTX. Spills live on the
    stack, so a kernel without a stack has none; one with a stack is disassembled in any case.
    """
    accesses = _by_line(asm["ptx"], _ptx_access)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        found = re.search(r"REG:(\d+)\s+STACK:(\d+)\s.*?LOCAL:(\d+)", usage)
        if found is None:
            raise RuntimeError(
                f"cuobjdump: expected REG, STACK and LOCAL figures, got {usage[:500]!r}"
            )
        stack = int(found[2]) + int(found[3])
        # triton's own asm["sass"] stops after 64 KB of machine code.
        sass = _cuobjdump("-sass", cubin) if disassemble or stack else None
    loads: collections.Counter[int] = collections.Counter()
    stores: collections.Counter[int] = collections.Counter()
    spills = 0
    if sass is None:
        for access in accesses:
            (stores if access.kind == "store" else loads)[access.bits] += access.count
    else:
        for name, modifiers in re.findall(r"\b(LDG|LDGSTS|STG|LDL|STL)\b((?:\.\w+)*)", sass):
            if name in ("LDL", "STL"):
                spills += 1
            else:
                (stores if name == "STG" else loads)[access_bits(modifiers)] += 1
    return {
        "registers": int(found[1]),
        "stack": stack,
        "spills": spills,
        "loads": dict(sorted(loads.items())),
        "stores": dict(sorted(stores.items())),
        "accesses": accesses,
        "loops": () if sass is None else loops(sass),
    }


def _cuobjdump(option: str, cubin: Path) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def amd_resources(asm: Mapping[str, Any]) -> dict[str, Any]:
    """The same of AMD assembly."""
    text = asm["amdgcn"]

    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"amdgcn: expected the figure .{name}, got none")
        return int(found[1])

    loads: collections.Counter[int] = collections.Counter()
    stores: collections.Counter[int] = collections.Counter()
    for line in text.splitlines():
        access = _amd_access(line)
        if access is not None:
            kind, bits = access
            (stores if kind == "store" else loads)[bits] += 1
    return {
        "registers": figure("vgpr_count"),
        "stack": figure("private_segment_fixed_size"),
        # A scalar register goes to a lane of a vector register; where none is left, to the stack,
        # which shows there.
        "spills": figure("vgpr_spill_count"),
        "loads": dict(sorted(loads.items())),
        "stores": dict(sorted(stores.items())),
        "accesses": _by_line(text, _amd_access),
    }


def _ptx_access(line: str) -> tuple[str, int] | None:
    if found := re.search(
        r"\bcp\.async\.c[ag]\.shared[.:\w]*\.global\S*\s[^,]*,[^,]*,\s*(\w+)", line
    ):
        return "load", 8 * int(found[1], 0)
    found = re.search(r"\b(ld|st)\.(?:[a-z]\w*(?:::\w+)*\.)*global((?:[.:]+\w+)*)", line)
    if found is None:
        return None
    words = re.split(r"[.:]+", found[2])
    bits = next((int(w[1:]) for w in reversed(words) if re.fullmatch(r"[bsuf]\d+", w)), 32)
    vector = next((int(w[1:]) for w in words if re.fullmatch(r"v\d", w)), 1)
    return "load" if found[1] == "ld" else "store", bits * vector


_AMD_BITS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}


def _amd_access(line: str) -> tuple[str, int] | None:
    found = re.match(r"\s*(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)", line)
    if found is None:
        return None
    kind, suffix = found[1], found[2]
    if wide := re.match(r"dword(?:x(\d))?", suffix):
        return kind, 32 * int(wide[1] or 1)
    if sized := re.match(
        r"(?:d16_)?(?:hi_)?[a-z]+(\d+)", suffix
    ):  # b128, u16, d16_b16 of newer chips
        return kind, int(sized[1])
    return kind, _AMD_BITS[suffix.split("_")[0]]


def _by_line(text: str, parse: Any) -> tuple[Access, ...]:
    """Count accesses per source line with the help of the .file and .loc directives."""
    files: dict[int, str] = {}
    here = (0, 0)
    counts: collections.Counter[tuple[tuple[int, int], str, int]] = collections.Counter()
    for line in text.splitlines():
        if found := re.match(r'\s*\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]*)"', line):
            files[int(found[1])] = f"{found[2]}/{found[3]}" if found[2] else found[3]
        elif found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            here = (int(found[1]), int(found[2]))
        elif access := parse(line):
            kind, bits = access
            counts[here, kind, bits] += 1
    return tuple(
        Access(files.get(number, "?"), line, kind, bits, count)
        for ((number, line), kind, bits), count in sorted(counts.items())
    )
