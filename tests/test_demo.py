"""The demo runs, and its numbers are computed: break something and they change."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tritonnorm
from bench.demo import digits, folding, training, view
from bench.e2e.inference import Variant
from bench.launches import Launches, observe
from tritonnorm.timing import Timing

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = digits.Settings(layers=1, width=16, epochs=1, batch=400)


def scaled(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this library's batch norm wrong by a factor."""
    right = tritonnorm.functional.batch_norm
    monkeypatch.setattr(
        tritonnorm.functional, "batch_norm", lambda *a, **k: right(*a, **k) * factor
    )


@pytest.fixture(scope="module")
def step() -> training.TrainingResult:
    return training.run(model="tiny", dtype="float64")


@pytest.mark.zoo
def test_the_replaced_model_is_equal(step: training.TrainingResult) -> None:
    assert (step.batch_norms, step.replaced, step.counters) == (6, 6, True)
    e = step.ours
    for error in (e.outputs, e.gradients, e.all_gradients, e.statistics, e.parameters):
        assert 0 < error < 1e-12  # 0 would be a comparison of a thing with itself
    assert sum(step.launches.interpreted.values()) >= 12 and view.kernels_ran(step.launches)
    console = Console(record=True, width=140, file=io.StringIO())
    assert view.training(console, [step])
    text = console.export_text()
    assert "changed 6 of 6 batch norms" in text and f"{e.all_gradients:.1e}" in text


@pytest.mark.zoo
def test_float32_is_compared_with_pytorch() -> None:
    found = training.run(model="tiny", dtype="float32")
    assert found.torchs is not None
    for ours, theirs in (
        (found.ours.outputs, found.torchs.outputs),
        (found.ours.all_gradients, found.torchs.all_gradients),
    ):
        assert 1e-9 < ours < 1e-4 and 1e-9 < theirs < 1e-4


@pytest.mark.zoo
def test_a_broken_batch_norm_shows_in_part_1(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled(1.001, monkeypatch)
    found = training.run(model="tiny", dtype="float64")
    assert found.ours.outputs > 1e-5 and found.ours.all_gradients > 1e-5
    console = Console(record=True, width=140, file=io.StringIO())
    assert not view.training(console, [found])
    assert "NOT equal" in console.export_text()


@pytest.mark.zoo
def test_the_fallback_is_not_taken_for_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")
    found = training.run(model="tiny", dtype="float64")
    assert not found.launches.interpreted and sum(found.launches.torch.values()) >= 6
    assert not view.training(Console(file=io.StringIO()), [found])


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = digits.run(settings=SETTINGS)
    names = [curve.name for curve in found.curves]
    assert names == [digits.WITH, digits.TORCH, digits.WITHOUT]
    assert (found.training_images, found.test_images) == (1347, 450)
    ours, theirs, without = (curve.accuracy for curve in found.curves)
    assert len(ours) == SETTINGS.epochs + 1 and ours[0] == theirs[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 0.02
    assert ours != without
    assert view.kernels_ran(found.launches) and "forward_kernel" in found.launches.interpreted
    assert digits.run(settings=SETTINGS).curves == found.curves  # a fixed seed
    picture = tmp_path / "new" / "digits.png"
    digits.draw(found, picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    scaled(0.0, monkeypatch)
    broken = digits.run(settings=SETTINGS)
    assert broken.curves[0] != found.curves[0] and broken.curves[1:] == found.curves[1:]


class Clock:
    """Says that what runs batch norms takes three seconds, and what runs none two."""

    def prepare(self, calls):
        with observe() as seen:
            for call in calls:
                call()
        return lambda: 3.0 if seen.torch else 2.0


@pytest.mark.zoo
def test_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = folding.run(model="tiny", size=32, rounds=2, clock=Clock())
    assert (found.before, found.after) == (6, 0)
    assert 0 < found.error < 1e-12 < found.error32 < 1e-4
    assert sum(found.launches.torch.values()) == 6 and not found.launches.interpreted
    assert (found.original.median, found.folded.median) == (3.0, 2.0)
    console = Console(record=True, width=140, file=io.StringIO())
    assert view.folding(console, found)
    assert "1.50 times as fast" in console.export_text()

    fold = tritonnorm.fold

    def wrong(model, *args, **kwargs):
        folded, report = fold(model, *args, **kwargs)
        with torch.no_grad():
            next(folded.parameters()).mul_(1.001)
        return folded, report

    monkeypatch.setattr(tritonnorm, "fold", wrong)
    with pytest.raises(RuntimeError, match=r"folded: error .* in float64, expected at most"):
        folding.run(model="tiny", size=32, rounds=1, clock=Clock())


def test_the_verdicts() -> None:
    """What the demo takes for right is not taken for granted."""
    fine = training.StepErrors(1e-15, 1e-15, 1e-15, 1e-15, 1e-15)
    result = training.TrainingResult(
        *("tiny", (1, 3, 8, 8), "float64", 2, 2, "", Launches(interpreted=Counter(k=1))),
        ours=fine,
        torchs=None,
        counters=True,
        wide_tiles=False,
    )
    silent = Console(file=io.StringIO())
    assert view.training(silent, [result])
    for change in (
        {"replaced": 1},
        {"counters": False},
        {"launches": Launches(torch=Counter(native_batch_norm=1))},
        {"ours": replace(fine, statistics=1e-3)},
        {"ours": replace(fine, outputs=float("inf"))},
        {"dtype": "float32", "torchs": fine, "ours": replace(fine, all_gradients=1e-14)},
    ):
        assert not view.training(silent, [replace(result, **change)]), change
    original = Variant(2, 0.0, 1e-7, Timing.of([2.0]))
    folded = Variant(0, 1e-15, 1e-7, Timing.of([1.0]))

    def before_and_after(original: Variant, folded: Variant) -> folding.FoldResult:
        return folding.FoldResult(
            *("tiny", (1, 3, 8, 8), "cpu", "float32", "NCHW", ""),
            variants={"eager": original, "folded": folded},
            skipped={},
            threads=1,
            launches=Launches(),
        )

    fold = before_and_after(original, folded)
    assert view.folding(silent, fold) and fold.speedup == 2.0 and fold.apart
    near = before_and_after(
        replace(original, timing=Timing(2.0, 1.9, 2.2, 9)),
        replace(folded, timing=Timing(1.9, 1.8, 2.1, 9)),
    )
    assert not near.apart and view.folding(silent, near)
    assert "does not tell them apart" in " ".join(silent.file.getvalue().split())
    assert not view.folding(silent, before_and_after(original, replace(folded, error=1e-3)))
    assert not view.folding(silent, before_and_after(original, replace(folded, batch_norms=2)))


@pytest.mark.slow
@pytest.mark.zoo
def test_the_command(tmp_path: Path) -> None:
    """The whole of it in the way a user starts it, but short."""
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "bench", "demo", "--quick"),
            *("--device", "cpu", "--out", str(tmp_path)),
        ],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout
    for i in range(1, 5):
        assert re.search(rf"^{i}  ", text, re.MULTILINE), text
    assert "changed 6 of 6 batch norms" in text and "equal up to rounding" in text
    assert "6 of 6 batch norms are gone" in text
    assert "counts equal the model to the byte" in text and "no spills" in text
    assert (tmp_path / "digits.png").is_file()
    assert done.stderr == ""
