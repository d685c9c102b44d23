"""Tables on a terminal of any width."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

__all__ = ["new_table", "plain", "show", "titled"]

UNBOUNDED = 10_000  # columns; wider than any table


def new_table(left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table with columns aligned to the left, then to the right."""
    table = Table(pad_edge=False, box=None)
    for name in left:
        table.add_column(name, header_style="underline", no_wrap=True)
    for name in right:
        table.add_column(name, header_style="underline", justify="right", no_wrap=True)
    return table


def titled(title: str, table: Table) -> Group:
    """A table under a title, which may be longer than the table is wide."""
    return Group(Text(title, style="bold"), table)


def show(console: Console, wide: RenderableType) -> None:
    """Print something that may be wider than the terminal: its lines wrap, nothing is cut off."""
    text = _rendered(wide, at_least=console.width, styled=True)
    console.print(Text.from_ansi(text), soft_wrap=True)


def plain(wide: RenderableType) -> str:
    """The text of something without its colours, as wide as it needs."""
    lines = _rendered(wide, at_least=1, styled=False).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def _rendered(wide: RenderableType, at_least: int, styled: bool) -> str:
    unbounded = Console(width=UNBOUNDED, file=io.StringIO())
    needed = Measurement.get(unbounded, unbounded.options, wide).maximum
    lines = Console(
        width=max(at_least, needed),
        file=io.StringIO(),
        force_terminal=styled,
        color_system="standard" if styled else None,
    )
    with lines.capture() as rendered:
        lines.print(wide)
    return rendered.get().rstrip("\n")
