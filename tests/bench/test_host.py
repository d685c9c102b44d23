"""What the CPU side costs: measured in this very test, so only what must hold is asserted."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from bench.host import calls, folding, imports
from bench.lab.fake_driver import FakeDriver
from bench.processes import Job, WorkFailed, run_jobs
from bench.record.file import Record
from bench.record.rows import HostRow, ModelRow, SkippedRow
from tests.bench.samples import ENVIRONMENT
from tests.bench.test_e2e import Clock


def test_imports() -> None:
    rows = imports.run(repeats=2)
    assert [(row.what, row.variant, row.samples) for row in rows] == [
        ("import", "torch", 2),
        ("import", "tritonnorm", 2),
        ("import", "tritonnorm, first call", 2),
    ]
    torch_us, ours_us, first_us = (row.p50_us for row in rows)
    assert 0 < ours_us < torch_us and 0 < first_us < 60e6
    assert all(row.p20_us <= row.p50_us <= row.p80_us for row in rows)
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        imports.run(repeats=0)


def test_imports_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow import shows where it is, and nowhere else; one that fails is not hidden."""
    monkeypatch.setattr(
        imports, "IMPORTS", {"a": "pass", "b": "time.sleep(0.3)", "c": "import json"}
    )
    a, b, c = imports.run(repeats=2)
    assert b.p50_us >= 300_000 > 10 * max(a.p50_us, c.p50_us)
    monkeypatch.setattr(imports, "IMPORTS", {"d": "import no_such_package"})
    with pytest.raises(RuntimeError, match=r"imports: .*No module named 'no_such_package'"):
        imports.run(repeats=1)


def test_every_import_is_of_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    run = subprocess.run

    def counted(command: list[str], **options: Any) -> Any:
        started.append(options)
        return run(command, **options)

    monkeypatch.setattr(imports, "IMPORTS", {"a": "pass"})
    monkeypatch.setattr(subprocess, "run", counted)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert imports.run(repeats=3)[0].samples == 3
    assert len(started) == 4  # one before them, unmeasured
    assert not any("TRITON_INTERPRET" in options["env"] for options in started)


def small_calls(progress: Any) -> tuple[list[HostRow], int]:
    """`calls.run`, and how many launches the driver saw: here it records them all the same."""
    logs: list[FakeDriver] = []
    right = calls.fake_driver

    @contextlib.contextmanager
    def recording(**options: Any) -> Iterator[Any]:
        with right(**options) as log:
            logs.append(log)
            yield SimpleNamespace()

    calls.fake_driver = recording
    rows = calls.run(progress, rounds=2, calls=5)
    return rows, sum(len(log.launches) for log in logs)


def test_calls() -> None:
    said: list[str] = []
    job = Job("calls", small_calls, threads=1)
    rows, launches = run_jobs([job], lambda name, done, of, what: said.append(what))[0]
    first, second = ("x".join(map(str, shape)) for shape in calls.SHAPES)
    modes = ("forward", "backward", "forward+backward", "inference")
    assert {(row.what, row.variant) for row in rows} == {
        (f"BN+relu {mode} {size}", variant)
        for mode in modes
        for size, variants in (
            (first, (calls.MODULE, calls.FUNCTION, calls.TORCH)),
            (second, (calls.MODULE, calls.FUNCTION)),
        )
        for variant in variants
    }
    assert len(rows) == 20 and said[:4] == [f"BN+relu {mode} {first}" for mode in modes]
    assert all(0 < row.p20_us <= row.p50_us <= row.p80_us and row.samples == 2 for row in rows)
    # Two of ours in each of 8 modes, warm-up and 2 rounds of 5 calls, a launch or more in each: so
    # none fell back to PyTorch.
    assert launches >= 2 * 8 * 3 * 5
    by_name = {(row.what, row.variant): row.p50_us for row in rows}
    both, forward = (by_name[f"BN+relu {m} {first}", calls.MODULE] for m in (modes[2], modes[0]))
    assert both > forward


def test_calls_need_the_compiler() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is on"):
        calls.run(rounds=1, calls=1)
    with pytest.raises(WorkFailed, match="TRITON_INTERPRET is on"):
        run_jobs([Job("calls", calls.run, (1, 1), interpret=True)])


@pytest.mark.zoo
def test_folding() -> None:
    said: list[tuple[float, float, str]] = []
    rows = folding.run(
        lambda done, of, what="": said.append((done, of, what)), ("tiny", "tiny"), 2.0, 32, Clock()
    )
    eager, folded, fx = rows[:3]
    assert len(rows) == 6 and isinstance(eager, ModelRow) and isinstance(folded, ModelRow)
    assert (eager.variant, eager.batch_norms, folded.variant, folded.batch_norms) == (
        *("eager", 6),
        *("folded", 0),
    )
    assert (folded.device, folded.dtype, folded.shape) == ("cpu", "float32", "1x3x32x32")
    assert 0 < folded.error < 1e-12
    assert isinstance(fx, SkippedRow) and fx.case == "tiny inference"
    done = [d for d, _, _ in said]
    assert (
        done == sorted(done) and done[-1] == 2 and any("checking folded" in w for _, _, w in said)
    )
    Record(ENVIRONMENT, models=[eager, folded], skipped=[fx]).to_json()
    assert folding.MODELS[0] == "resnet-50" and set(folding.QUICK) <= set(folding.MODELS)


@pytest.mark.zoo
def test_torch_folds_what_it_can_trace() -> None:
    """EfficientNet-B0: both fold the same batch norms, and both are equal to the original."""
    found = folding.compare(model="efficientnet-b0", variants=folding.VARIANTS, size=64, rounds=1)
    assert found.variants["torch.fx"].batch_norms < found.before == 49
    assert found.after <= found.variants["torch.fx"].batch_norms
    error = found.variants["torch.fx"].error
    assert error is not None and 0 < error < 1e-12
