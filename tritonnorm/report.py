"""What `replace` and `fold` did to each batch norm, and why: rows, and a plain-text table."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

LEFT = "left"


@dataclass(frozen=True)
class Row:
    """The decision on one batch norm.

    Attributes:
        name: dotted name of the module in the model; "(root)" for the model itself.
        kind: class name of the module as it was found.
        decision: "replaced", "folded", "reduced" (an addition per channel stays), "fused" (one
            launch with its activation) or "left".
        reason: why, in words; never empty.
        rule: the rule that applied, such as "conv2d -> bn"; empty when none did.
        partner: name of the module it was folded into or fused with; empty when there is none.
        scale: largest |gamma / sqrt(var + eps)| over the channels, for a folded batch norm.
        error: largest error of the folded pair in float64, relative to the largest output.
    """

    name: str
    kind: str
    decision: str
    reason: str
    rule: str = ""
    partner: str = ""
    scale: float | None = None
    error: float | None = None


@dataclass
class Report:
    """One `Row` for every batch norm of a model, in the order of `model.named_modules()`.

    Attributes:
        operation: "replace" or "fold".
        rows: the rows.
        notes: remarks on the whole model, one sentence each.
        dry_run: True when nothing was changed and the rows say what would have been done.
        error: fold only: largest relative error of the whole model in float64, None if unknown.
        eps: fold only: of each batch norm that was folded, by name.
    """

    operation: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False
    error: float | None = None
    eps: dict[str, float] = field(default_factory=dict, repr=False)
    _undo: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Set what `undo` does."""
        self._undo = action

    def undo(self) -> None:
        """Take the change back: the model gets its original modules and parameters again.

        Raises:
            ValueError: nothing was changed, or it was taken back already.
        """
        if self._undo is None:
            raise ValueError("undo: expected the report of a change that is still in place")
        self._undo()
        self._undo = None

    @property
    def counts(self) -> dict[str, int]:
        """How many rows each decision has, most frequent first."""
        return dict(Counter(row.decision for row in self.rows).most_common())

    @property
    def skipped(self) -> list[Row]:
        """The rows of the batch norms that were left as they were."""
        return [row for row in self.rows if row.decision == LEFT]

    @property
    def remaining(self) -> list[Row]:
        """The rows of the batch norms that are still there: left, or fused with an activation."""
        return [row for row in self.rows if row.decision in (LEFT, "fused")]

    @property
    def summary(self) -> str:
        """One line: how many batch norms there are and what became of them."""
        head = f"{self.operation}{' (dry run, nothing changed)' if self.dry_run else ''}: "
        if not self.rows:
            return head + "the model has no batch norm"
        total = len(self.rows)
        parts = ", ".join(f"{count} {decision}" for decision, count in self.counts.items())
        return head + f"{total} batch norm{'' if total == 1 else 's'}: {parts}"

    def table(self, width: int | None = None) -> str:
        """The rows as a plain-text table.

        Args:
            width: columns to fill; the terminal's width when None. The reason is wrapped to fit,
                and gets at least 30 columns even where that makes the table wider.
        """
        if width is None:
            width = shutil.get_terminal_size((110, 24)).columns
        names = ["name", "kind", "decision"]
        names += [key for key in ("rule", "partner") if any(getattr(row, key) for row in self.rows)]
        names += [key for key in ("scale", "error") if any(_has(row, key) for row in self.rows)]
        cells = [[_cell(getattr(row, key)) for key in names] for row in self.rows]
        sizes = [max(len(key), *(len(line[i]) for line in cells)) for i, key in enumerate(names)]
        room = max(30, width - sum(sizes) - 2 * len(sizes))
        head = [key.ljust(size) for key, size in zip(names, sizes, strict=True)]
        lines = ["  ".join([*head, "reason"]), "  ".join("-" * size for size in [*sizes, room])]
        for row, line in zip(self.rows, cells, strict=True):
            start = [text.ljust(size) for text, size in zip(line, sizes, strict=True)]
            reason = textwrap.wrap(row.reason, room) or [""]
            lines.append("  ".join([*start, reason[0]]))
            lines += [" " * (sum(sizes) + 2 * len(sizes)) + more for more in reason[1:]]
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        parts = [self.summary]
        if self.rows:
            parts.append(self.table())
        parts += [f"note: {note}" for note in self.notes]
        return "\n".join(parts)

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`, one column per attribute of `Row`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            message = "Report.to_pandas() needs pandas: install it with `pip install pandas`"
            raise ImportError(message) from error
        columns = [item.name for item in fields(Row)]
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=columns)


def _has(row: Row, key: str) -> bool:
    return getattr(row, key) is not None


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.2g}"
