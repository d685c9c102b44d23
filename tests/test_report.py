"""The report: every batch norm has a decision and a reason, in text and as a table of data."""

from __future__ import annotations

import builtins
import dataclasses
import subprocess
import sys

import pytest

from tritonnorm.report import Report, Row

ROWS = [
    Row("stem.bn", "BatchNorm2d", "folded", "why not", "conv2d -> bn", "stem.conv", 1.5, 2e-8),
    Row("head", "SyncBatchNorm", "left", "the batch norm is in training mode: " + "word " * 40),
    Row("tail.0.bn", "BatchNorm1d", "folded", "fine", "linear -> bn", "tail.0.fc", 0.25, 0.0),
]


def test_rows_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROWS[0].reason = "other"  # type: ignore[misc]


def test_counts_skipped_and_summary() -> None:
    report = Report("fold", list(ROWS))
    assert report.counts == {"folded": 2, "left": 1}
    assert report.skipped == [ROWS[1]]
    assert report.summary == "fold: 3 batch norms: 2 folded, 1 left"
    assert "dry run" in Report("fold", list(ROWS), dry_run=True).summary
    assert Report("replace").summary == "replace: the model has no batch norm"
    assert str(Report("replace")) == "replace: the model has no batch norm"


def test_text_holds_everything_and_fits_the_width() -> None:
    text = str(Report("fold", list(ROWS), ["one remark"]))
    for row in ROWS:
        assert row.name in text and row.kind in text and row.decision in text
    assert text.endswith("note: one remark")
    table = Report("fold", list(ROWS)).table(width=120)
    assert max(len(line) for line in table.splitlines()) <= 120
    # the long reason is wrapped, not cut
    start = table.splitlines()[0].index("reason")
    words = " ".join(line[start:] for line in table.splitlines()[2:]).split()
    assert words.count("word") == 40


def test_columns_that_nobody_fills_are_not_shown() -> None:
    head = Report("replace", [Row("bn", "BatchNorm2d", "left", "because")]).table().splitlines()[0]
    assert head.split() == ["name", "kind", "decision", "reason"]
    head = Report("fold", list(ROWS)).table().splitlines()[0]
    assert head.split()[3:] == ["rule", "partner", "scale", "error", "reason"]


def test_narrow_terminal_keeps_the_reason_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = Report("fold", list(ROWS)).table()
    assert "in training mode" in " ".join(text.split())


def test_to_pandas() -> None:
    pytest.importorskip("pandas")
    frame = Report("fold", list(ROWS)).to_pandas()
    assert list(frame.columns) == [f.name for f in dataclasses.fields(Row)]
    assert frame["decision"].tolist() == ["folded", "left", "folded"]
    assert frame["scale"].iloc[0] == 1.5
    assert list(Report("fold").to_pandas().columns) == list(frame.columns)


def test_to_pandas_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name == "pandas":
            raise ImportError("No module named 'pandas'")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install pandas"):
        Report("fold").to_pandas()


def test_the_module_is_a_leaf() -> None:
    """It needs nothing but the standard library, so that any room may use it."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('report', {_path()!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['report'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print([m for m in ('torch', 'pandas', 'triton', 'tritonnorm') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _path() -> str:
    return str(sys.modules[Report.__module__].__file__)
