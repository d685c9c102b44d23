"""The audits as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group

from bench.audit.compile import GPUS, CompileRow
from bench.audit.traffic import TrafficRow
from bench.report.terminal import new_table, titled

__all__ = ["compile_summary", "compile_table", "traffic_summary", "traffic_table"]


def traffic_table(rows: Sequence[TrafficRow]) -> Group:
    """A row per algorithm and direction: bytes counted, by the model, and the fewest."""
    table = new_table(
        ("algorithm", "direction", "operation", "input"),
        ("counted", "model", "fewest", "ratio", "vectors", "launches"),
    )
    for row in rows:
        c = row.call
        mode = "" if c.training else " (inference)"
        table.add_row(
            *(row.algorithm, row.direction, c.op + mode, f"{c.size} {c.layout} {c.type}"),
            *(f"{n:,}" for n in (row.counted, row.model, row.minimum)),
            *(f"{row.ratio:.2f}", f"{row.vectors:,}", str(len(row.kernels))),
        )
    return titled("Traffic: bytes of activations and mask, counted in the interpreter", table)


def traffic_summary(rows: Sequence[TrafficRow]) -> str:
    """One sentence: whether the counts are those of the models."""
    wrong = [row for row in rows if not row.exact]
    if wrong:
        named = "; ".join(
            f"{r.algorithm} {r.direction} {r.call.op} {r.call.size} {r.call.layout}" for r in wrong
        )
        return f"{len(wrong)} of {len(rows)} counts are NOT those of the model: {named}"
    return (
        f"All {len(rows)} counts equal the model to the byte; no access out of bounds, no race. "
        "Per-channel vectors and workspace are counted apart."
    )


def compile_table(rows: Sequence[CompileRow]) -> Group:
    """A row per kernel of an algorithm: the most registers per target, spills, and the widths."""
    table = new_table(
        ("algorithm", "direction", "kernel"),
        ("forms", *GPUS, "spills", "stack", "access", "allowed", "issue", "wait", "launches"),
    )
    groups: dict[tuple[str, str, str], list[CompileRow]] = {}
    for row in rows:
        names = (row.case.algorithm, row.direction, row.report.kernel)
        groups.setdefault(names, []).append(row)
    for key, group in groups.items():
        registers = {
            target: max((r.report.registers for r in group if r.report.target == target), default=0)
            for target in GPUS
        }
        touching = [row for row in group if row.widths]
        found = _joined(min(row.widths.values()) for row in touching)
        allowed = _joined(row.expected for row in touching)
        shares = (max(row.issue for row in group), max(row.wait for row in group))
        table.add_row(
            *key,
            str(len(group)),
            *(str(registers[target] or "") for target in GPUS),
            str(sum(r.report.spills for r in group)),
            str(max(r.report.stack for r in group)),
            *(found, allowed, *(f"{share:.2f}" if share else "" for share in shares)),
            _joined(row.launches for row in group),
        )
    title = (
        "Compile: registers a thread, spills, the narrowest access of an activation in bits; "
        "issue: of the time that its bytes take on an H200, what a kernel's instructions need; "
        "wait: of that time on its own GPU, what it waits for loads where it waits most"
    )
    return titled(title, table)


def _joined(numbers: Iterable[int]) -> str:
    """The distinct numbers in order, as ``64/128``."""
    return "/".join(map(str, sorted(set(numbers))))


def compile_summary(rows: Sequence[CompileRow]) -> str:
    """One sentence if all is well, else a line for every fault."""
    wrong = [row for row in rows if row.faults]
    if wrong:
        lines = [f"{row}: {', '.join(row.faults)}" for row in wrong]
        return "\n".join([f"{len(wrong)} of {len(rows)} compiled kernels have faults:", *lines])
    return (
        f"All {len(rows)} compiled kernels: no spills, no stack, every access of an activation as "
        "wide as its alignment allows; where instructions were counted, the bytes take longer."
    )
