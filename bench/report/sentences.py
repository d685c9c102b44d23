"""What a report says in sentences, in whatever form."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from bench.record.file import Record
from bench.record.rows import FLAGS, FoldRow, ModelRow, OpRow
from bench.report.cells import OPS, number

__all__ = [
    "OURS",
    "empty_columns",
    "geometric_mean",
    "gpu_line",
    "has_gpu",
    "header",
    "legend",
    "method",
    "summary",
    "title",
]

OURS = "tritonnorm"


def has_gpu(record: Record) -> bool:
    """Whether the run had a GPU: one has multiprocessors."""
    return bool(record.environment["gpu"]["sms"])


def title(record: Record) -> str:
    """``tritonnorm on ...``."""
    return f"{OURS} on {gpu_line(record)}" if has_gpu(record) else f"{OURS} on a CPU"


def gpu_line(record: Record) -> str:
    """``NVIDIA L4 (sm_89, 58 multiprocessors, 48 MiB L2)``."""
    gpu = record.environment["gpu"]
    if not has_gpu(record):
        return "no GPU"
    parts = [gpu["arch"], f"{gpu['sms']:g} multiprocessors"]
    if gpu["l2_bytes"]:
        parts.append(f"{gpu['l2_bytes'] / 2**20:g} MiB L2")
    return f"{gpu['name']} ({', '.join(parts)})"


def header(record: Record) -> list[str]:
    """A line each on the host, the versions, the commit and the roofs; `title` has the GPU."""
    e = record.environment
    commit = (e["commit"] or "unknown")[:12] + (" with changes" if e["dirty"] else "")
    lines = [
        *([_listed(e["host"])] if e.get("host") else []),
        _listed(e["versions"]),
        f"commit {commit}, {e['date']}, seed {e['seed']}",
    ]
    roofs = {kind: record.roof(kind) for kind in ("theoretical", "copy", "read")}
    known = [f"{kind} {number(rate)}" for kind, rate in roofs.items() if rate is not None]
    if known:
        lines.append(f"roofs in GB/s: {', '.join(known)}")
    return lines


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)


def empty_columns(record: Record) -> str | None:
    """One sentence: the columns that no row fills, and whether a GPU would; None if all are."""
    empty = [c for c in OPS if not any(c.text(row) for row in record.ops)]
    if not has_gpu(record):
        names = ", ".join(c.title for c in empty if c.gpu)
        if not record.ops:
            return f"There was no GPU: no operation was timed, so there is no {names}."
        return f"There was no GPU, which these columns need: {names}." if names else None
    names = ", ".join(c.title for c in empty if c.title not in ("flags", "plan"))
    return f"Left out, empty in every row: {names}." if names and record.ops else None


def legend(record: Record) -> list[str]:
    """What the flags mean that occur, a line each."""
    tables: tuple[Iterable[OpRow | FoldRow | ModelRow], ...]
    tables = (record.ops, record.folds, record.models)
    used = {letter for rows in tables for row in rows for letter in row.flags}
    return [f"{letter}: {meaning}" for letter, meaning in FLAGS.items() if letter in used]


def method(record: Record) -> list[str]:
    """How the figures that it has came about, a paragraph each."""
    said = []
    if record.ops:
        where = "inside CUDA graphs, " if has_gpu(record) else ""
        said += [
            "An operation is timed only after its result was checked against float64. All "
            f"providers run the same case in turn, in random order, {where}on random data; the "
            "figures are quantiles of the time of one call over the samples.",
            "Cold: buffers rotate that together have at least four times the size of the "
            "last-level cache; rows for which they have not are flagged C. Warm: one set of "
            "buffers, which may stay in the cache.",
            "GB/s is the fewest bytes that the operation must move, whoever runs it, over the "
            "median time. Percent of peak is of the theoretical bandwidth, percent of copy of what "
            "a plain copy reached in the same run.",
        ]
    if record.folds:
        said.append(
            "Folding computes the weight and bias of every layer from its own and those of the "
            "batch norm behind it; backward is their gradients. Results and gradients are checked "
            "against float64 before anything is timed."
        )
    if record.models:
        said.append(
            "A model is timed only after its result was checked against the unchanged model in "
            "float64. The parts of a training step are medians of their own and need not add up to "
            "that of the whole."
        )
    return said


def summary(record: Record) -> list[str]:
    """A line per mode on what `OURS` reached: speed-ups and share of the copy roof."""
    lines = []
    groups: dict[tuple[str, str], list[OpRow]] = {}
    for row in record.ops:
        if row.provider == OURS:
            groups.setdefault((row.cache, row.mode), []).append(row)
    for (cache, mode), rows in sorted(groups.items(), key=lambda item: item[0][0]):
        parts = [
            f"{mean:.2f}x {name}"
            for name, mean in (
                ("eager", geometric_mean(r.x_eager for r in rows)),
                ("compile", geometric_mean(r.x_compile for r in rows)),
            )
            if mean is not None
        ]
        said = [f"{' and '.join(parts)} (geometric mean)"] if parts else []
        copies = [r.copy_percent for r in rows if r.copy_percent is not None]
        if copies:
            said.append(f"{statistics.median(copies):.1f} % of the copy roof (median)")
        if said:
            warm = ", warm" if cache == "warm" else ""
            cases = f"{len(rows)} case{'s' * (len(rows) != 1)}"
            lines.append(f"{OURS}, {mode}{warm}, {cases}: {', '.join(said)}")
    return lines


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known and positive; None if there is none."""
    known = [v for v in values if v]
    return statistics.geometric_mean(known) if known else None
