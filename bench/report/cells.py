"""The tables of a report as cells of text, for whatever shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.record.file import Record
from bench.record.rows import CounterRow, ModelRow, OpRow

__all__ = ["OPS", "Cell", "Column", "Section", "number", "sections"]

BELOW = -1.0  # sorts an empty cell below all figures: they are never negative


@dataclass(frozen=True)
class Cell:
    """A text, and what to sort it by."""

    text: str
    key: float | str


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, what a row has in it ("" is nothing), what to sort by.

    Attributes:
        about: what the figure is, in a few words.
        gpu: whether it takes a GPU to fill it.
    """

    title: str
    text: Callable[[Any], str]
    key: Callable[[Any], float | str | None] | None = None
    about: str = ""
    gpu: bool = False

    @property
    def numeric(self) -> bool:
        return self.key is not None

    def cell(self, row: Any) -> Cell:
        text = self.text(row)
        if self.key is None:
            return Cell(text, text)
        key = self.key(row)
        return Cell(text, BELOW if key is None else key)


@dataclass(frozen=True)
class Section:
    """A table with a title. Columns that are empty in all rows are left out."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of(cls, name: str, title: str, columns: Sequence[Column], rows: Sequence[Any]) -> Section:
        kept = [c for c in columns if any(c.text(row) for row in rows)]
        return cls(name, title, tuple(kept), tuple(tuple(c.cell(r) for c in kept) for r in rows))


def number(x: float | None) -> str:
    """Three digits or a few more, never an exponent; "" for None."""
    if x is None:
        return ""
    places = 0 if abs(x) >= 1000 else 1 if abs(x) >= 10 else 2 if abs(x) >= 1 else 3
    return f"{x:,.{places}f}"


def _percent(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}"


def _times(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def _range(low: float, high: float) -> str:
    return f"{number(low)}/{number(high)}"


OPS = (
    Column("op", lambda r: r.op),
    Column("mode", lambda r: r.mode),
    Column("layout", lambda r: r.layout),
    Column("dtype", lambda r: r.dtype),
    Column("shape", lambda r: r.shape),
    Column("provider", lambda r: r.provider),
    Column("p50 us", lambda r: number(r.p50_us), lambda r: r.p50_us, "median time of a call"),
    Column(
        "p20/p80",
        lambda r: _range(r.p20_us, r.p80_us),
        lambda r: r.p80_us / r.p20_us,
        "quantiles of the time; sorted by their ratio",
    ),
    Column(
        "noise",
        lambda r: f"{100 * r.noise:.1f}%",
        lambda r: r.noise,
        "standard deviation over mean of the samples",
    ),
    Column(
        "GB/s",
        lambda r: number(r.gb_s),
        lambda r: r.gb_s,
        "fewest bytes over median time",
        gpu=True,
    ),
    Column(
        "%peak",
        lambda r: _percent(r.peak_percent),
        lambda r: r.peak_percent,
        "of the theoretical bandwidth",
        gpu=True,
    ),
    Column(
        "%copy",
        lambda r: _percent(r.copy_percent),
        lambda r: r.copy_percent,
        "of the bandwidth of a plain copy",
        gpu=True,
    ),
    Column(
        "host us",
        lambda r: number(r.host_us),
        lambda r: r.host_us,
        "host time of one eager call",
        gpu=True,
    ),
    Column(
        "peak MB",
        lambda r: number(r.peak_mb),
        lambda r: r.peak_mb,
        "device memory that a call adds at its highest, 1e6 bytes",
        gpu=True,
    ),
    Column("x eager", lambda r: _times(r.x_eager), lambda r: r.x_eager, "times as fast", gpu=True),
    Column(
        *("x compile", lambda r: _times(r.x_compile), lambda r: r.x_compile, "times as fast"),
        gpu=True,
    ),
    Column("flags", lambda r: r.flags),
    Column("plan", lambda r: r.plan),
)

_TIMED = ("p50 us", "p20/p80", "noise", "GB/s", "%peak", "%copy", "host us")
FOLDS = (
    Column("model", lambda r: r.model),
    Column("mode", lambda r: r.mode),
    Column("layout", lambda r: r.layout),
    Column("dtype", lambda r: r.dtype),
    Column("pairs", lambda r: str(r.pairs), lambda r: r.pairs),
    Column("provider", lambda r: r.provider),
    *(c for c in OPS if c.title in (*_TIMED, "x eager", "x compile", "flags")),
    Column("error", lambda r: f"{r.error:.1e}", lambda r: r.error, "checked before timing"),
)

COUNTERS = (
    Column("regime", lambda r: r.regime),
    *(c for c in OPS if c.title in ("op", "mode", "layout", "dtype", "shape", "plan")),
    Column("launches", lambda r: str(r.launches), lambda r: r.launches),
    Column("read MB", lambda r: number(r.read_bytes / 1e6), lambda r: r.read_bytes),
    Column(
        *("of fewest", lambda r: _times(_reads(r)), lambda r: _reads(r)),
        "DRAM bytes read over those that must be read",
    ),
    Column("written MB", lambda r: number(r.written_bytes / 1e6), lambda r: r.written_bytes),
    Column("fewest MB", lambda r: number(r.fewest / 1e6), lambda r: r.fewest),
)


def _reads(row: CounterRow) -> float:
    return row.read_bytes / row.fewest_read


ROOFS = (
    Column("roof", lambda r: r.kind),
    Column("bytes", lambda r: f"{r.bytes:,}" if r.bytes else "", lambda r: r.bytes),
    Column("GB/s", lambda r: number(r.gb_s), lambda r: r.gb_s),
    Column(
        "p20/p80",
        lambda r: _range(r.p20_gb_s, r.p80_gb_s) if r.bytes else "",
        lambda r: r.p80_gb_s / r.p20_gb_s,
    ),
)

SKIPPED = (
    Column("provider", lambda r: r.provider),
    Column("case", lambda r: r.case or "all"),
    Column("reason", lambda r: r.reason),
)


def _models(rows: Sequence[ModelRow]) -> tuple[Column, ...]:
    eager = {_model(r): r.p50_ms for r in rows if r.variant == "eager"}

    def speedup(row: ModelRow) -> float | None:
        base = eager.get(_model(row))
        return None if base is None else base / row.p50_ms

    return (
        Column("model", lambda r: r.model),
        Column("mode", lambda r: r.mode),
        Column("device", lambda r: r.device),
        Column("layout", lambda r: r.layout),
        Column("dtype", lambda r: r.dtype),
        Column("shape", lambda r: r.shape),
        Column("variant", lambda r: r.variant),
        Column("p50 ms", lambda r: number(r.p50_ms), lambda r: r.p50_ms),
        Column("p20/p80", lambda r: _range(r.p20_ms, r.p80_ms), lambda r: r.p80_ms / r.p20_ms),
        Column("noise", lambda r: f"{100 * r.noise:.1f}%", lambda r: r.noise),
        Column("forward ms", lambda r: number(r.forward_ms), lambda r: r.forward_ms),
        Column("backward ms", lambda r: number(r.backward_ms), lambda r: r.backward_ms),
        Column("optimizer ms", lambda r: number(r.optimizer_ms), lambda r: r.optimizer_ms),
        Column("x eager", lambda r: _times(speedup(r)), speedup, "times as fast"),
        Column("batch norms", lambda r: str(r.batch_norms), lambda r: r.batch_norms),
        Column("error", lambda r: f"{r.error:.1e}", lambda r: r.error, "checked before timing"),
        Column("flags", lambda r: r.flags),
    )


def _model(row: ModelRow) -> tuple[str, ...]:
    """What the variants of a model share."""
    return (row.model, row.mode, row.device, row.dtype, row.layout, row.shape)


HOST = (
    Column("what", lambda r: r.what),
    Column("variant", lambda r: r.variant),
    Column("p50 us", lambda r: number(r.p50_us), lambda r: r.p50_us),
    Column("p20/p80", lambda r: _range(r.p20_us, r.p80_us), lambda r: r.p80_us / r.p20_us),
    Column("samples", lambda r: str(r.samples), lambda r: r.samples),
)


def sections(record: Record) -> list[Section]:
    """The tables of a record that have rows: operations cold and warm, models, host, ..."""
    ops: dict[str, list[OpRow]] = {"cold": [], "warm": []}
    for row in record.ops:
        ops[row.cache].append(row)
    found = [
        Section.of("ops", "Operations", OPS, ops["cold"]),
        Section.of("warm", "Operations, tensors left in the cache (warm)", OPS, ops["warm"]),
        Section.of("folds", "Folding the weights of a model", FOLDS, record.folds),
        Section.of("counters", "DRAM traffic by the GPU's counters", COUNTERS, record.counters),
        Section.of("models", "Whole models", _models(record.models), record.models),
        Section.of("host", "Host", HOST, record.host),
        Section.of("roofs", "Roofs", ROOFS, record.roofs),
        Section.of("skipped", "Asked for and not measured", SKIPPED, record.skipped),
    ]
    return [section for section in found if section.rows]
