"""``python -m bench audit``."""

from __future__ import annotations

from rich.console import Console

from bench.audit.compile import cases, compile_jobs, in_order
from bench.audit.tables import (
    compile_summary,
    compile_table,
    traffic_summary,
    traffic_table,
)
from bench.audit.traffic import count_all, layer_calls
from bench.processes import Job, run_jobs
from bench.report.terminal import show
from bench.screen import Screen

__all__ = ["main"]


def main(console: Console, quick: bool = False, processes: int = 2) -> int:
    """Run both audits and print them; the exit code is 1 if either finds a fault."""
    todo = cases(quick)
    jobs = [
        Job("traffic", count_all, (layer_calls(quick),), interpret=True, threads=1),
        *compile_jobs(todo, processes),
    ]
    with Screen(console, {"Traffic audit": ("traffic",), "Compile audit": ("compile",)}) as screen:
        traffic, *shares = run_jobs(jobs, screen.progress, at_once=processes)
    compiled = in_order(shares)
    show(console, traffic_table(traffic))
    console.print(traffic_summary(traffic), "\n")
    show(console, compile_table(compiled))
    console.print(compile_summary(compiled))
    exact = all(row.exact for row in traffic)
    return 0 if exact and not any(row.faults for row in compiled) else 1
