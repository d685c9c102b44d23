"""Progress bars of work in child processes."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Screen"]


class Screen:
    """A progress bar per title, each fed by all jobs whose name starts with one of its prefixes.

    A context manager; `progress` is what `bench.processes.run_jobs` wants.
    """

    def __init__(self, console: Console, titles: Mapping[str, tuple[str, ...]]) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", style="dim"),
            console=console,
            transient=True,
        )
        self._prefixes = dict(titles)
        self._tasks: dict[str, TaskID] = {}
        self._shares: dict[str, dict[str, tuple[float, float]]] = {t: {} for t in titles}

    def __enter__(self) -> Screen:
        self._bars.start()
        width = max(map(len, self._prefixes))
        for title in self._prefixes:
            self._tasks[title] = self._bars.add_task(
                title.ljust(width), total=1.0, what="", start=False
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def progress(self, job: str, done: float, of: float, what: str) -> None:
        """Move the bar that the job belongs to; all jobs of a bar add up."""
        for title, prefixes in self._prefixes.items():
            if job.startswith(prefixes):
                task, shares = self._tasks[title], self._shares[title]
                if not shares:
                    self._bars.start_task(task)
                shares[job] = (done, of)
                done, of = (sum(parts) for parts in zip(*shares.values(), strict=True))
                self._bars.update(task, completed=done, total=of, what=what)

    def done(self, title: str) -> None:
        """Take a bar away."""
        self._bars.remove_task(self._tasks[title])
