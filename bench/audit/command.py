"""``python -m bench audit``."""

from __future__ import annotations

from rich.console import Console

from bench.audit.compile import GPUS, cases, compile_jobs, in_order
from bench.audit.layers import count_twins, layer_cases, layer_rows, layer_table
from bench.audit.others import other_calls, other_cases
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
    """Run all audits and print them; the exit code is 1 if one finds a fault.

    ``quick``: few calls, and of the networks two layers, compiled for the H200 alone.
    """
    layers = layer_rows(quick)
    todo = cases(quick) + layer_cases(layers, ("sm_90",) if quick else tuple(GPUS))
    todo += other_cases(quick)
    calls = [*layer_calls(quick), *other_calls(quick)]
    jobs = [
        Job("traffic", count_all, (calls,), interpret=True, threads=1),
        Job("twins", count_twins, (layers,), interpret=True, threads=1),
        *compile_jobs(todo, processes),
    ]
    parts = {"Traffic audit": ("traffic", "twins"), "Compile audit": ("compile",)}
    with Screen(console, parts) as screen:
        traffic, twins, *shares = run_jobs(jobs, screen.progress, at_once=processes)
    compiled = in_order(shares)
    show(console, layer_table(layers))
    console.print(f"Twins of them: {traffic_summary(twins)}", "\n")
    show(console, traffic_table(traffic))
    console.print(traffic_summary(traffic), "\n")
    show(console, compile_table(compiled))
    console.print(compile_summary(compiled))
    exact = all(row.exact for row in (*traffic, *twins))
    return 0 if exact and not any(row.faults for row in compiled) else 1
