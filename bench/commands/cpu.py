"""What a machine without a GPU can tell: the audits, host time, import time, latency of folding."""

from __future__ import annotations

from rich.console import Console

from bench.audit.command import main as audit
from bench.commands.files import BENCH, NO_OUTPUTS, Outputs, write
from bench.host import calls, folding, imports
from bench.processes import Job, run_jobs
from bench.record.environment import environment
from bench.record.file import Record
from bench.report.table import record_table
from bench.report.terminal import show
from bench.screen import Screen

__all__ = ["host", "without_gpu"]


def without_gpu(console: Console, processes: int = 2) -> int:
    """What ``python -m bench`` does where there is no GPU: the quick audit, then `host`."""
    console.print(
        "No GPU here. Below: bytes moved and machine code of the kernels, which need none, and "
        "what the CPU side costs. Times of operations, bandwidth and memory need a GPU: run the "
        "same command there.\n"
    )
    audited = audit(console, quick=True, processes=processes)
    console.print()
    return max(audited, host(console, Outputs.all_in(BENCH / "out" / "cpu")))


def host(console: Console, outputs: Outputs = NO_OUTPUTS, quick: bool = False) -> int:
    """Import time of the package, host time of a call, and latency of folded models."""
    models = folding.QUICK if quick else folding.MODELS
    jobs = [
        Job("imports", imports.run),
        Job("calls", calls.run, threads=1),
        Job("folding", folding.run, (models,), threads=1),
    ]
    with Screen(console, {job.name.title(): (job.name,) for job in jobs}) as screen:
        # One at a time: each measures time, and two would measure each other.
        found = run_jobs(jobs, screen.progress, at_once=1)
    record = Record(environment(None))
    record.add(row for rows in found for row in rows)
    show(console, record_table(record))
    write(console, record, outputs)
    return 0
