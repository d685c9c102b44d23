"""What ``tritonnorm tune`` shows: a bar while it runs, a table at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tritonnorm.device import Device
from tritonnorm.tune.jobs import candidates_for
from tritonnorm.tune.key import Key
from tritonnorm.tune.problems import Shape
from tritonnorm.tune.prune import prune
from tritonnorm.tune.session import Summary

__all__ = ["dry_run", "watched"]


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
    )


def watched(
    run: Callable[[Iterable[Shape], Callable[[Summary, str], None]], Summary],
    problems: Sequence[Shape],
    console: Console | None = None,
) -> Summary:
    """Run a session under a progress bar, and print what came of it."""
    console = console or Console()
    with _bar(console) as bar:
        task = bar.add_task("", total=None)

        def progress(summary: Summary, what: str) -> None:
            words = f"{what}{_failures(summary.failures, ', ')}"
            done = len(summary.done) + summary.skipped
            bar.update(task, total=summary.total, completed=done, description=words)

        summary = run(problems, progress)
    _print(console, summary)
    return summary


def _print(console: Console, summary: Summary) -> None:
    table = Table("problem", "choice", "us", "formula us", "gain", box=None)
    for one in summary.done:
        best = one.result.best
        if best is None:
            table.add_row(str(one.key), one.result.error or "")
            continue
        gain = one.result.formula_us / one.result.us if one.result.us else 1.0
        config = ", ".join(f"{name}={value}" for name, value in vars(best[1]).items())
        mark = "" if one.changed else " (as before)"
        times = (f"{one.result.us:.1f}", f"{one.result.formula_us:.1f}", f"{gain:.2f}x")
        table.add_row(str(one.key), f"{best[0]}({config}){mark}", *times)
    if summary.done:
        console.print(table)
    found = sum(one.result.best is not None for one in summary.done)
    line = f"{found} of {summary.total} problems have a result now"
    if summary.skipped:
        line += f"; {summary.skipped} were left out"
    if summary.stopped:
        line += f"; {summary.stopped}, and what was found is kept"
    if any(one.result.best is not None and not one.kept for one in summary.done):
        line += "; not all of it is on disk"
    console.print(line + _failures(summary.failures, "; configurations dropped: "), highlight=False)


def _failures(failures: Counter[str], before: str) -> str:
    if not failures:
        return ""
    return before + ", ".join(f"{count} {reason}" for reason, count in failures.most_common())


def dry_run(
    problems: Sequence[Shape],
    device: Device,
    processes: int,
    console: Console | None = None,
) -> int:
    """Compile all configurations of all problems, and say how many are left and why.

    Returns:
        0, or 1 if a problem has no configuration left.
    """
    console = console or Console()
    wanted = {Key.of(p): p for p in problems}
    if not wanted:
        raise ValueError("--preset, --shapes or --model: expected what to tune, got nothing")
    todo = {key: (p, candidates_for(p, device)) for key, p in wanted.items()}
    table = Table("problem", "configurations", "left", "dropped", box=None)
    reasons: Counter[str] = Counter()
    counts, none = [0, 0], 0
    interrupted = False
    with _bar(console) as bar:
        task = bar.add_task(f"compiling for {device.arch}", total=None)

        def progress(done: int, of: int) -> None:
            bar.update(task, total=of, completed=done)

        try:
            for key, result in prune(todo, device, processes, progress):
                tried = len(todo[key][1])
                counts = [counts[0] + tried, counts[1] + len(result.kept)]
                none += not result.kept
                reasons.update(result.reasons)
                dropped = _failures(result.reasons, "")
                table.add_row(str(key), str(tried), str(len(result.kept)), dropped)
        except KeyboardInterrupt:
            interrupted = True
    console.print(table)
    console.print(
        f"{device.name} ({device.arch}): {len(wanted)} problems, {counts[0]} configurations, "
        f"{counts[1]} left{_failures(reasons, '; dropped: ')}",
        highlight=False,
    )
    return 130 if interrupted else int(none > 0)
