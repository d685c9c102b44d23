"""A record, or a comparison of two, as tables for a terminal and as text to paste."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from bench.record.compare import Comparison
from bench.record.file import Record
from bench.report.cells import Section, number, sections
from bench.report.sentences import (
    empty_columns,
    geometric_mean,
    header,
    legend,
    summary,
    title,
)
from bench.report.terminal import new_table, plain

__all__ = ["comparison_table", "comparison_text", "record_markdown", "record_table"]

# GitHub refuses a comment of more than 65536 characters.
LONGEST = 65_000
# A table of more rows is folded away in Markdown.
FOLDED = 40
# How many names of rows are listed that only one of two records has.
NAMED = 10
STYLES = {"SLOW": "bold red", "AMBIGUOUS": "yellow", "FAST": "green", "SAME": "dim"}


def record_table(record: Record) -> Group:
    """Environment, summary, all tables and the legend of a record; print it with `show`."""
    parts: list[RenderableType] = [Text(title(record), style="bold")]
    parts += map(Text, header(record))
    parts += [Text(line, style="green") for line in summary(record)]
    for section in sections(record):
        parts += [Text(), Text(section.title, style="bold"), _rich(section)]
    parts += [Text(), *(Text(line, style="dim") for line in _notes(record))]
    return Group(*parts)


def record_markdown(record: Record, longest: int = LONGEST) -> str:
    """The same as a block of Markdown to paste.

    Long tables are folded. If the whole were longer than `longest` characters, the last rows of the
    table with the most rows are left out, and the text says how many.
    """
    tables = sections(record)
    text = _markdown(record, tables)
    if len(text) <= longest or not tables:
        return text
    cut = max(tables, key=lambda table: len(table.rows))
    sizes = range(len(cut.rows))
    fitting = bisect_right(
        sizes, longest, key=lambda size: len(_markdown(record, tables, {cut.name: size}))
    )
    return _markdown(record, tables, {cut.name: max(fitting - 1, 0)})


def comparison_table(comparison: Comparison) -> Group:
    """Differences of the environments, a row per pair, rows without a partner, and the counts."""
    parts: list[RenderableType] = []
    if comparison.differences:
        parts.append(Text("Not the same in both (base -> new):", style="bold"))
        parts += [Text(f"  {difference}") for difference in comparison.differences]
        parts.append(Text())
    table = new_table(("verdict", "row"), ("base", "p20/p80", "new", "p20/p80", "unit", "change"))
    table.add_column("why", header_style="underline", no_wrap=True)
    for row in comparison.rows.itertuples():
        table.add_row(
            Text(row.verdict, style=STYLES[row.verdict]),
            Text(row.row),
            *(number(row.base_p50), f"{number(row.base_p20)}/{number(row.base_p80)}"),
            *(number(row.new_p50), f"{number(row.new_p20)}/{number(row.new_p80)}"),
            *(row.unit, f"{row.change_percent:+.1f}%", Text(row.why, style="dim")),
        )
    parts += [table, Text()]
    for which, names in (("base", comparison.only_base), ("new", comparison.only_new)):
        parts += map(Text, _unmatched(which, names))
    parts.append(Text(_verdicts(comparison), style="bold"))
    return Group(*parts)


def comparison_text(comparison: Comparison) -> str:
    """`comparison_table` without colours, as wide as it needs."""
    return plain(comparison_table(comparison)) + "\n"


def _rich(section: Section) -> Table:
    table = Table(pad_edge=False, box=None)
    for column in section.columns:
        justify: JustifyMethod = "right" if column.numeric else "left"
        table.add_column(column.title, header_style="underline", justify=justify, no_wrap=True)
    for row in section.rows:
        table.add_row(*(Text(cell.text) for cell in row))
    return table


def _notes(record: Record) -> list[str]:
    """The flags that occur, and the columns that are empty."""
    empty = empty_columns(record)
    return [*legend(record), *([empty] if empty else [])]


def _markdown(record: Record, tables: Sequence[Section], kept: Mapping[str, int] = {}) -> str:
    """The whole text; of the tables in `kept` only as many rows."""
    lines = [f"**{_escaped(title(record))}**", ""]
    lines += [f"- {_escaped(line)}" for line in [*header(record), *summary(record)]]
    if command := record.environment.get("command"):
        lines.append(f"- {_escaped(command)}")
    for table in tables:
        lines += _markdown_table(table, kept.get(table.name, len(table.rows)))
    lines += ["", *(f"- {_escaped(line)}" for line in _notes(record))]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(section: Section, kept: int) -> list[str]:
    rows = section.rows[:kept]
    lines = [
        _markdown_row(column.title for column in section.columns),
        "|" + "|".join("---:" if column.numeric else "---" for column in section.columns) + "|",
        *(_markdown_row(cell.text for cell in row) for row in rows),
    ]
    if left_out := len(section.rows) - kept:
        lines += ["", f"{left_out} more rows are in the results file."]
    if len(rows) <= FOLDED:
        return ["", f"**{section.title}**", "", *lines]
    said = f"<b>{section.title}</b>, {len(section.rows)} rows"
    return ["", f"<details><summary>{said}</summary>", "", *lines, "", "</details>"]


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*|<\[])", r"\\\1", " ".join(text.split()))


def _unmatched(which: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    lines = [f"Only in {which} ({len(names)}):", *(f"  {name}" for name in names[:NAMED])]
    more = len(names) - NAMED
    return [*lines, f"  and {more} more", ""] if more > 0 else [*lines, ""]


def _verdicts(comparison: Comparison) -> str:
    """How many of each, and the geometric mean of the changes."""
    counts = ", ".join(f"{n} {verdict}" for verdict, n in comparison.counts.items() if n)
    mean = geometric_mean(comparison.rows["new_p50"] / comparison.rows["base_p50"])
    assert mean is not None  # there is a row
    rows = len(comparison.rows)
    return f"{rows} row{'s' * (rows != 1)} in both: {counts}; times x {mean:.3f} (geometric mean)"
