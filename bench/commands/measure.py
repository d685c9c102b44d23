"""Commands that measure a GPU: ``run``, ``submit``, ``roofline``, and ``python -m bench`` alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import counters as bench_counters
from bench.commands.files import BENCH, NO_OUTPUTS, Outputs, write
from bench.machine import Gpu, Machine
from bench.providers import DEFAULT, select
from bench.record.environment import environment
from bench.record.file import Record
from bench.record.rows import SkippedRow
from bench.report.table import record_table
from bench.report.terminal import show
from bench.roofs import measured_roofs, theoretical_roof
from bench.runner import DEFAULTS, Options
from bench.session import session, wrong
from bench.suites import OWN, cases

__all__ = ["Request", "counters", "quick", "roofline", "run", "submit"]

RESULTS = BENCH / "results"
#: Seconds after which the quick run begins no further case: with what is under way it stays below
#: 90.
QUICK_LIMIT = 75.0


@dataclass(frozen=True)
class Request:
    """What ``run`` is asked for; see `bench.suites.cases` and `bench.runner.Options`.

    Attributes:
        providers: names, or ``all``.
        limit: seconds after which no case begins, None for no end.
    """

    suite: str = "quick"
    ops: Sequence[str] = (OWN,)
    dtypes: Sequence[str] = ("bf16",)
    layouts: Sequence[str] | None = None
    modes: Sequence[str] | None = None
    batches: Sequence[int] | None = None
    providers: Sequence[str] = DEFAULT
    options: Options = DEFAULTS
    limit: float | None = None


QUICK = Request(limit=QUICK_LIMIT)


def run(
    console: Console,
    request: Request,
    outputs: Outputs = NO_OUTPUTS,
    machine: Machine | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Measure, print the table, write what is asked for.

    Returns:
        0, or 1 if this library gave a wrong result or failed anywhere.

    Raises:
        ValueError: a name in the request is unknown; nothing has run then.
        NoGpu: there is none.
    """
    record = _measured(console, request, outputs, machine, arguments)
    show(console, record_table(record))
    write(console, record, outputs)
    return _verdict(console, record)


def quick(console: Console, machine: Machine | None = None) -> int:
    """What ``python -m bench`` does where there is a GPU: the quick suite and its report."""
    return run(*(console, QUICK, Outputs.all_in(BENCH / "out" / "quick"), machine))


def submit(
    console: Console,
    request: Request = QUICK,
    source: Path | None = None,
    machine: Machine | None = None,
    results: Path = RESULTS,
) -> int:
    """Put a run into ``bench/results/<gpu>/<date>.json``, ready for a pull request.

    Args:
        source: a results file to take; by default the request is measured now.

    Raises:
        ValueError: the run was not on a GPU, or with changes that no commit has.
        FileExistsError: there is a file of that day.
    """
    if source is not None:
        record = Record.read(source)
    else:
        record = _measured(console, request, NO_OUTPUTS, machine, None)
    e = record.environment
    if not e["gpu"]["sms"] or not record.ops:
        raise ValueError(f"{source or 'the run'}: expected operations measured on a GPU")
    if e["dirty"]:
        raise ValueError(
            f"{source or 'the run'}: measured with changes that are not committed; commit them, so "
            "that others can repeat it"
        )
    path = results / slug(e["gpu"]["name"]) / f"{e['date']}.json"
    if path.exists():
        raise FileExistsError(f"{path} is there already; move it, or submit on another day")
    record.save(path)
    show(console, record_table(record))
    console.print(f"\nWritten: {path}\nAdd it to a pull request.", soft_wrap=True)
    return _verdict(console, record)


def roofline(
    console: Console, outputs: Outputs = NO_OUTPUTS, machine: Machine | None = None
) -> int:
    """Measure the roofs over sizes from a fraction of the last-level cache to many times it."""
    machine = machine or Gpu()
    cache = max(machine.facts.l2_bytes, 1 << 20)
    sizes = tuple((cache * share // 16 >> 16 << 16) or 1 << 16 for share in (1, 4, 8, 16, 32, 128))
    record = Record(environment(machine))
    theoretical = theoretical_roof(machine)
    record.roofs = [*([theoretical] if theoretical else []), *measured_roofs(machine, sizes)]
    show(console, record_table(record))
    write(console, record, outputs)
    return 0


def counters(console: Console, regimes: Sequence[str], outputs: Outputs = NO_OUTPUTS) -> int:
    """DRAM bytes of a call in each of these regimes; see `bench.counters`."""
    rows = bench_counters.measure(regimes)
    record = Record(environment(Gpu()), counters=rows)
    show(console, record_table(record))
    write(console, record, outputs)
    return 0


def slug(name: str) -> str:
    """``nvidia_h200`` of ``NVIDIA H200``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _measured(
    console: Console,
    request: Request,
    outputs: Outputs,
    machine: Machine | None,
    arguments: Sequence[str] | None,
) -> Record:
    r = request
    found = cases(r.suite, r.ops, r.dtypes, r.layouts, r.modes, r.batches)
    providers = select(r.providers)
    machine = machine or Gpu()
    bars = Progress(
        *(TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with bars:
        bar = bars.add_task("", total=len(found))

        def progress(done: float, of: float, what: str = "") -> None:
            bars.update(bar, completed=done, total=of, description=what)

        keep = None if outputs.json is None else _keep(outputs.json)
        return session(
            *(found, providers, machine, r.options, progress, arguments), keep=keep, limit=r.limit
        )


def _keep(path: Path) -> Callable[[Record], None]:
    return lambda record: record.save(path)


def _verdict(console: Console, record: Record) -> int:
    failed: list[SkippedRow] = wrong(record)
    for row in failed:
        console.print(f"[red]FAILED[/red] {row.provider} {row.case}: {row.reason}", soft_wrap=True)
    return 1 if failed else 0
