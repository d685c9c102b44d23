"""Commands on results files, ``show`` and ``compare``, and what the others write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.record.compare import compare as compared
from bench.record.file import Record
from bench.report.html import save_html
from bench.report.pictures import save_pngs
from bench.report.table import comparison_table, record_markdown, record_table
from bench.report.terminal import show as show_wide

__all__ = ["BENCH", "NO_OUTPUTS", "Outputs", "compare", "show", "write"]

BENCH = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Outputs:
    """Files that a command writes; None is none of that kind. ``pictures`` is a folder."""

    json: Path | None = None
    csv: Path | None = None
    html: Path | None = None
    md: Path | None = None
    pictures: Path | None = None

    @classmethod
    def all_in(cls, folder: Path) -> Outputs:
        """One of each kind, in a folder."""
        json, csv, html, md = (folder / f"bench.{kind}" for kind in ("json", "csv", "html", "md"))
        return cls(json, csv, html, md, folder)


NO_OUTPUTS = Outputs()


def write(console: Console, record: Record, outputs: Outputs) -> None:
    """Write a record in every form asked for, and say where."""
    written: list[Path] = []
    for path in (outputs.json, outputs.csv, outputs.html, outputs.md):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append(path)
    if outputs.json:
        record.save(outputs.json)
    if outputs.csv:
        record.frame().to_csv(outputs.csv, index=False)
    if outputs.html:
        save_html(record, outputs.html)
    if outputs.md:
        outputs.md.write_text(record_markdown(record), encoding="utf-8")
    if outputs.pictures:
        written += save_pngs(record, outputs.pictures)
    if written:
        console.print("\nWritten: " + ", ".join(map(str, written)), soft_wrap=True)


def show(console: Console, path: Path, outputs: Outputs = NO_OUTPUTS) -> int:
    """Print a results file, and write it in other forms."""
    record = Record.read(path)
    show_wide(console, record_table(record))
    write(console, record, outputs)
    return 0


def compare(console: Console, base: Path, new: Path, force: bool = False) -> int:
    """Compare two results files; 1 if anything got slower, see `bench.record.compare`."""
    found = compared(Record.read(base), Record.read(new), force)
    show_wide(console, comparison_table(found))
    return 1 if found.regressed else 0
