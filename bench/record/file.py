"""A results file: JSON with a header (the environment) and tables of rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from bench.record.rows import (
    TABLES,
    CounterRow,
    FoldRow,
    HostRow,
    ModelRow,
    OpRow,
    RoofRow,
    Row,
    SkippedRow,
)
from bench.record.schema import SCHEMA, fault

__all__ = ["Record", "load"]

PLAUSIBLE = 105.0  # percent of the theoretical peak; above it a time, a size or the peak is wrong


@dataclass
class Record:
    """One run: the environment it ran in, and its rows.

    Attributes:
        environment: nested plain values, see `bench.record.environment`.
        ops, folds, counters, roofs, models, host, skipped: the rows of each table.
    """

    environment: dict[str, Any]
    ops: list[OpRow] = field(default_factory=list)
    folds: list[FoldRow] = field(default_factory=list)
    counters: list[CounterRow] = field(default_factory=list)
    roofs: list[RoofRow] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    host: list[HostRow] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)

    def frame(self, table: str = "ops") -> pd.DataFrame:
        """A table as a DataFrame, a column per field of its rows.

        Raises:
            ValueError: no such table.
        """
        if table not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(TABLES)}; got {table!r}")
        columns = [field.name for field in fields(TABLES[table])]
        return pd.DataFrame([asdict(row) for row in getattr(self, table)], columns=columns)

    def add(self, rows: Iterable[Row]) -> None:
        """Put rows into the tables that they belong to."""
        tables = {row: name for name, row in TABLES.items()}
        for row in rows:
            getattr(self, tables[type(row)]).append(row)

    def roof(self, kind: str) -> float | None:
        """The highest bandwidth of a kind of roof, in 1e9 bytes a second; None if there is none."""
        return max((row.gb_s for row in self.roofs if row.kind == kind), default=None)

    def to_json(self) -> str:
        """The file's text: one row a line, so that a change reads well."""
        lines = [f'"schema": {json.dumps(SCHEMA)}']
        lines.append('"environment": ' + json.dumps(self.environment, indent=1, allow_nan=False))
        for table in TABLES:
            rows = [json.dumps(asdict(row), allow_nan=False) for row in getattr(self, table)]
            lines.append(f'"{table}": [' + ",".join(f"\n {row}" for row in rows) + "\n]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            ValueError: the record is not plausible; nothing is written.
        """
        text = self.to_json()
        content = json.loads(text)
        try:
            _check(content, str(path))
        except ImportError:  # rows of our own fit the schema: a bare machine can still measure
            _check_figures(content, str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".part")
        try:
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a file and check it.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a results file, or its figures cannot be true; the message says
                which.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        except ValueError as error:
            raise ValueError(f"{path}: not a results file: {error}") from None
        _check(content, str(path))
        tables: dict[str, Any] = {
            name: [row(**r) for r in content.get(name, [])] for name, row in TABLES.items()
        }
        return cls(content["environment"], **tables)


def load(*paths: str | Path, table: str = "ops") -> pd.DataFrame:
    """The rows of results files as one DataFrame.

    Args:
        paths: files, or folders whose ``*.json`` are taken, subfolders included.
        table: "ops", "folds", "counters", "roofs", "models", "host" or "skipped".

    Returns:
        A column per field of the rows, and ``gpu``, ``date`` and ``file`` before them.

    Raises:
        OSError: a file cannot be read, or there is none.
        ValueError: a file is not a results file, or there is no such table.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no results files in {', '.join(map(str, paths)) or 'nothing'}")
    frames = []
    for file in files:
        record = Record.read(file)
        frame = record.frame(table)
        frame.insert(0, "gpu", record.environment["gpu"]["name"])
        frame.insert(1, "date", record.environment["date"])
        frame.insert(2, "file", str(file))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _check(content: Any, where: str) -> None:
    """Raise for the first thing that is not as the schema says, or cannot be true."""
    if (wrong := fault(content)) is not None:
        raise ValueError(f"{where}: {wrong}")
    _check_figures(content, where)


def _check_figures(content: Any, where: str) -> None:
    """Raise for the first figure that cannot be true."""
    roofs = [row["gb_s"] for row in content["roofs"] if row["kind"] == "theoretical"]
    roof = max(roofs, default=None)
    for table in ("ops", "folds", "models", "host"):
        for i, row in enumerate(content.get(table, [])):
            problem = _unordered(row) or (implausible(row, roof) if "gb_s" in row else None)
            if problem is not None:
                raise ValueError(f"{where}: {table}/{i}: {problem}")


def _refuse(constant: str) -> None:
    """JSON has no NaN and no infinities; Python reads them unless told not to."""
    raise ValueError(f"{constant} is not a number")


def _unordered(row: dict[str, Any]) -> str | None:
    unit = "ms" if "p50_ms" in row else "us"
    p20, p50, p80 = (row[f"{quantile}_{unit}"] for quantile in ("p20", "p50", "p80"))
    return None if p20 <= p50 <= p80 else f"p20, p50, p80 are not in order: {p20}, {p50}, {p80}"


def implausible(row: dict[str, Any], roof: float | None) -> str | None:
    """What of an operation cannot be; ``roof`` is the theoretical one in 1e9 bytes a second."""
    rate = row["bytes"] / row["p50_us"] * 1e-3
    if abs(rate - row["gb_s"]) > 0.01 * rate:
        return f"gb_s is {row['gb_s']}, but bytes over p50_us is {rate:.1f}"
    if roof is not None and abs((row["peak_percent"] or 0.0) - 100 * rate / roof) > 1:
        return (
            f"peak_percent is {row['peak_percent']}, but of the roof it is {100 * rate / roof:.1f}"
        )
    over = (row["peak_percent"] or 0.0) > PLAUSIBLE
    if over and "C" not in row["flags"] and row.get("cache") != "warm":
        return f"{row['peak_percent']:.1f} % of the peak, and not from the cache"
    return None
