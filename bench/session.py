"""A run from its start to its record: who is here, the roofs, then case by case."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bench.machine import Machine
from bench.processes import Progress, silent
from bench.providers import Provider
from bench.record.environment import environment
from bench.record.file import Record
from bench.record.rows import SkippedRow
from bench.roofs import measured_roofs, theoretical_roof
from bench.runner import DEFAULTS, Options, measure
from bench.suites import Case

__all__ = ["present", "session", "wrong"]


def present(providers: Sequence[Provider]) -> tuple[list[Provider], list[SkippedRow]]:
    """The providers that can run here, and why the others cannot."""
    reasons = {provider.name: provider.absent() for provider in providers}
    here = [provider for provider in providers if reasons[provider.name] is None]
    away = [SkippedRow(name, "", reason) for name, reason in reasons.items() if reason is not None]
    return here, away


def session(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    machine: Machine,
    options: Options = DEFAULTS,
    progress: Progress = silent,
    arguments: Sequence[str] | None = None,
    keep: Callable[[Record], object] | None = None,
    limit: float | None = None,
) -> Record:
    """Measure the roofs, then every case by every provider that is here.

    Args:
        cases: what to measure.
        providers: by whom. The memory and the time of a case are shared by all of them.
        machine: where.
        options: how.
        progress: told which case is next.
        arguments: of the command line, for the record.
        keep: given the record after every case, so that an interrupted run loses nothing.
        limit: seconds after which no case begins any more.
    """
    start = time.monotonic()
    here, away = present(providers)
    record = Record(environment(machine, options.seed, arguments), skipped=away)
    progress(0, len(cases) + 1, "the roofs")
    theoretical = theoretical_roof(machine)
    record.roofs = [*([theoretical] if theoretical else []), *measured_roofs(machine)]
    roofs = (record.roof("theoretical"), record.roof("copy"))
    for i, case in enumerate(cases):
        progress(i + 1, len(cases) + 1, str(case))
        if limit is not None and time.monotonic() - start > limit:
            reason = f"not begun: the limit of {limit:g} s was over"
            record.skipped += [SkippedRow(provider.name, str(case), reason) for provider in here]
            continue
        rows, skipped = measure(case, here, machine, roofs, options)
        record.ops += rows
        record.skipped += skipped
        if keep is not None:
            keep(record)
    progress(len(cases) + 1, len(cases) + 1, "done")
    return record


def wrong(record: Record, provider: str = "tritonnorm") -> list[SkippedRow]:
    """Cases that a provider should have computed and did not: a wrong result, or an error."""
    harmless = ("needs about", "not begun")  # memory and time are not its fault
    return [
        row
        for row in record.skipped
        if row.provider == provider and not row.reason.startswith(harmless)
    ]
