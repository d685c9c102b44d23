"""What is read out of a log of ncu; the counting itself needs a GPU."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import counters
from bench.commands.measure import counters as run
from bench.counters import MARKER, READ, REGIMES, WRITTEN, Kernel, kernels_in, rows_of
from bench.record.file import Record
from bench.report.table import record_markdown
from tests.bench.samples import ENVIRONMENT
from tritonnorm.device import KNOWN

HEADER = f'"ID","Process Name","Kernel Name","Stream","{READ}","{WRITTEN}"'
LOG = f"""==PROF== Connected to process 1
{HEADER}
"","","","","byte","byte"
"0","python","void at::spin_kernel(long)","7","32","0"
"1","python","forward_kernel","7","13,000,000","12,000,000"
"2","python","void at::spin_kernel(long)","7","0","0"
"3","python","reduce_kernel","7","26,000,000","64"
"4","python","gradient_kernel","7","1,000,000","11,500,000"
"""
NAME = "a channel in a program"  # 32x256x28x28 in bfloat16: S is 12.8 MB


def test_launches_of_a_log() -> None:
    found = list(kernels_in(LOG))
    assert [k.name for k in found if MARKER not in k.name] == [
        *("forward_kernel", "reduce_kernel", "gradient_kernel")
    ]
    assert found[1] == Kernel("forward_kernel", 13_000_000, 12_000_000)


def test_other_units_are_refused() -> None:
    with pytest.raises(RuntimeError, match="expected bytes, got Mbyte"):
        list(kernels_in(LOG.replace('"byte","byte"', '"Mbyte","Mbyte"')))


def test_rows() -> None:
    forward, backward = rows_of(list(kernels_in(LOG)), [NAME], KNOWN["h200"])
    s = 32 * 256 * 28 * 28 * 2
    assert (forward.launches, forward.read_bytes, forward.written_bytes) == (1, 13e6, 12e6)
    assert forward.fewest_read == 2 * s and forward.fewest == 3 * s + s // 16
    assert (backward.launches, backward.read_bytes) == (2, 27e6)
    # dy, x and the mask are read; dx and dresidual written.
    assert backward.fewest_read == 2 * s + s // 16 and backward.fewest == 4 * s + s // 16
    assert backward.written_bytes == 64 + 11_500_000


@pytest.mark.parametrize(
    "kernels",
    [
        [],
        [Kernel(MARKER, 0, 0), Kernel("a", 1, 1)],  # backward is missing
        [Kernel(MARKER, 0, 0), Kernel(MARKER, 0, 0), Kernel("a", 1, 1)],  # forward launched nothing
    ],
)
def test_a_log_that_lacks_calls_is_refused(kernels: list[Kernel]) -> None:
    with pytest.raises(RuntimeError, match="expected 2 calls with launches"):
        list(rows_of(kernels, [NAME], KNOWN["h200"]))


def test_regimes_are_calls_that_can_be_made() -> None:
    for name, call in REGIMES.items():
        assert call.problem("forward").bytes > 0, name
        assert call.channels_last is False or len(call.shape) == 4


def test_a_record_of_counters(tmp_path: Path) -> None:
    rows = list(rows_of(list(kernels_in(LOG)), [NAME], KNOWN["h200"]))
    record = Record(ENVIRONMENT, counters=rows)
    record.save(tmp_path / "counters.json")
    assert Record.read(tmp_path / "counters.json").counters == rows
    text = record_markdown(record)
    assert "DRAM traffic" in text and NAME in text
    assert f"{rows[0].read_bytes / rows[0].fewest_read:.2f}" in text


def test_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="regime: expected one of"):
        run(Console(file=io.StringIO()), ["nothing"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no GPU"):
        counters.measure()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="ncu is not on the PATH"):
        counters.measure()


def test_the_command_leaves_clocks_and_cache_alone(tmp_path: Path) -> None:
    found = counters.command("python", tmp_path / "log", [NAME])
    assert found[0] == "ncu" and found[-4:] == ["python", "-m", "bench.counters", NAME]
    for option in ("--cache-control", "--clock-control"):
        assert found[found.index(option) + 1] == "none"
