"""Whole models without a GPU: checks, rows and reasons are real; only the clock is made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import tritonnorm
from bench.demo.tiles import wide_tiles
from bench.e2e import forms, inference, step, training
from bench.models import build
from bench.record.file import Record
from bench.record.rows import ModelRow, SkippedRow
from tests.bench.samples import ENVIRONMENT

pytestmark = pytest.mark.zoo
WORK = training.Workload("tiny", "cpu", batch=2, size=16, dtype="float32")
INFERENCE = {"model": "tiny", "device": "cpu", "batch": 2, "size": 32, "dtype": "float32"}


class Clock:
    """Runs what it is given, and says that the n-th variant takes n milliseconds."""

    def __init__(self) -> None:
        self.variants = 0

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        self.variants += 1
        milliseconds = self.variants

        def measure() -> float:
            for call in calls:
                call()
            return 1e-3 * milliseconds

        return measure


class Compiler:
    """A backend of torch.compile that runs the graph as it is, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.graphs = factor, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return lambda *args: tuple(out * self.factor for out in graph(*args))


def broken_compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    raise NotImplementedError("no such\n  machine")


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Stands for `captured`: warms up, once is enough here; a replay is a call."""
    call()
    return call


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small steps in wide tiles, and no CUDA graphs."""
    monkeypatch.setattr(
        training.Workload, "small", lambda self, dtype: replace(self, batch=3, size=16, dtype=dtype)
    )
    monkeypatch.setattr(step, "captured", replayed)
    monkeypatch.setattr(forms, "captured", replayed)
    with wide_tiles("cpu", 64, 512):
        yield


def train(*variants: str, **options: Any) -> list[ModelRow | SkippedRow]:
    options = {"rounds": 1, "clock": Clock(), **options}
    return training.run(work=WORK, variants=variants or None, **options)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "variants",
    [
        pytest.param(training.VARIANTS[:4], id="loop", marks=pytest.mark.slow),
        pytest.param(("eager", *training.VARIANTS[4:]), id="graph"),
    ],
)
def test_training_step(variants: Sequence[str], tmp_path: Path) -> None:
    compiler = Compiler()
    rows = train(*variants, backend=compiler)
    measured = [row for row in rows if isinstance(row, ModelRow)]
    assert rows == measured and [row.variant for row in measured] == list(variants)
    # Two graphs of a compiled model: in float64, and in what is timed.
    assert compiler.graphs == 2 * sum("compile" in name for name in variants)
    for i, row in enumerate(measured):
        assert row.p50_ms == pytest.approx(i + 1)
        assert (row.model, row.mode, row.shape) == ("tiny", "training step", "2x3x16x16")
        assert (row.device, row.dtype, row.layout) == ("cpu", "float32", "NHWC")
        assert (row.batch_norms, row.samples, row.flags) == (6, 1, "")
        parts = (row.forward_ms, row.backward_ms, row.optimizer_ms)
        if "graph" in row.variant:
            assert parts == (None, None, None)
        else:
            assert all(part is not None and 0 < part < 60_000 for part in parts)
        # Kernels round otherwise than PyTorch; the same operators in another wrapping do not.
        assert (0 < row.error < 1e-12) if "replace" in row.variant else row.error < 1e-14
    record = Record(ENVIRONMENT, models=measured)
    record.save(tmp_path / "results.json")
    assert Record.read(tmp_path / "results.json") == record


def test_only_a_gpu_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "interpreted", lambda device: False)
    rows = train()
    assert [row.provider for row in rows if isinstance(row, SkippedRow)] == [
        *("eager", "replace", "compile", "compile+replace")
    ]
    assert {row.case for row in rows} == {"tiny training step"}
    assert all(row.reason.startswith("needs a GPU") for row in rows)


@pytest.mark.parametrize(("dtype", "by"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_a_wrong_batch_norm_is_not_timed(
    dtype: torch.dtype, by: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong in float64 by what float32 would not show, and wrong only in what is timed."""
    right = tritonnorm.functional.batch_norm

    def wrong(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return right(x, *args, **options) * (1 + by if x.dtype == dtype else 1)

    monkeypatch.setattr(tritonnorm.functional, "batch_norm", wrong)
    clock = Clock()
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        RuntimeError, match=rf"replace: error .* of the [a-z ]+ after a step in {kind}, exp"
    ):
        train("eager", "replace", clock=clock)
    assert clock.variants == 0


def test_the_fallback_is_not_taken_for_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")
    with pytest.raises(RuntimeError, match=r"calls of PyTorch's batch norm, expected none"):
        train("eager", "replace")


@pytest.mark.parametrize(
    ("backend", "reason"),
    [(broken_compiler, "no such machine"), (Compiler(1 + 1e-6), "after a step in float64")],
)
def test_a_compiler_that_fails_or_is_wrong_is_skipped(backend: Any, reason: str) -> None:
    eager, compiled = train("eager", "compile", backend=backend)
    assert isinstance(eager, ModelRow) and eager.error == 0
    assert isinstance(compiled, SkippedRow) and compiled.provider == "compile"
    assert reason in compiled.reason and "\n" not in compiled.reason


@pytest.mark.parametrize("left", ["momentum", "parameters"])
def test_a_capture_that_leaves_its_warm_up_behind_is_wrong(
    left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check sees state that `Step.captured` did not put back."""
    captured = step.Step.captured

    def forgetful(self: step.Step) -> Callable[[], Any]:
        with pytest.MonkeyPatch.context() as patch:  # the model's own zeros are made before
            if left == "momentum":
                patch.setattr(torch.Tensor, "zero_", lambda self: self)
            else:
                patch.setattr(torch.nn.Module, "load_state_dict", lambda *args: None)
            return captured(self)

    monkeypatch.setattr(step.Step, "captured", forgetful)
    _, graph = train("eager", "eager+graph")
    assert isinstance(graph, SkippedRow) and "after a step in float64" in graph.reason


def test_autocast_and_the_parts_of_a_step() -> None:
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else 0)
            return super().forward(x)

    class Laps:
        points = 0

        def start(self) -> None:
            Laps.points = 1

        def mark(self) -> None:
            Laps.points += 1

    net = Net(3, 10)
    weight = net.weight.detach().clone()
    labels = torch.tensor([1, 2])
    for dtype in ("bfloat16", "float32"):
        work = replace(WORK, dtype=dtype)
        call = step.Step(net, net, torch.randn(2, 3), labels, work.autocast, Laps())
        assert not call().requires_grad
        assert Laps.points == 4 and all(p.grad is None for p in net.parameters())
    assert seen == [torch.bfloat16, 0] and not torch.equal(net.weight, weight)


def test_a_step_in_float64_may_be_timed() -> None:
    work = replace(WORK, dtype="float64")
    rows = training.run(work=work, variants=("eager", "replace"), rounds=1, clock=Clock())
    assert all(isinstance(row, ModelRow) and row.dtype == "float64" for row in rows)


class Convolutions(TorchFunctionMode):
    """Dtype of the convolutions that run, and whether input and weight are channels last."""

    def __init__(self) -> None:
        self.seen: set[tuple[torch.dtype, bool]] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            for tensor in args[:2]:
                if min(tensor.shape) > 1:  # else both orders are one
                    last = tensor.is_contiguous(memory_format=torch.channels_last)
                    self.seen.add((tensor.dtype, last))
        return func(*args, **(kwargs or {}))


def test_layouts_and_dtypes() -> None:
    with Convolutions() as training_step:
        step.step_of("eager", build("tiny"), WORK, "eager")()
    assert training_step.seen == {(torch.float32, True)}
    for last, dtype in ((True, "bfloat16"), (False, "float32")):
        subject = forms.Subject.of("tiny", "cpu", (2, 3, 32, 32), dtype, last)
        form = forms.Form.of("folded", subject)
        with Convolutions() as forward:
            form.forward()
        assert forward.seen == {(getattr(torch, dtype), last)}


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"variants: expected parts of .*; got faster"):
        train("eager", "faster+graph")
    with pytest.raises(ValueError, match="dtype: expected one of"):
        replace(WORK, dtype="int8")
    with pytest.raises(ValueError, match="variants: expected eager first"):
        inference.run(**INFERENCE, variants=("folded", "eager"))
    with pytest.raises(ValueError, match=r"variant: expected parts of .*; got quick"):
        inference.run(**INFERENCE, variants=("eager", "folded", "quick"))
    with pytest.raises(ValueError, match="model: expected one of"):
        inference.run(model="no such", device="cpu")
    with pytest.raises(ValueError, match="dtype: expected one of"):
        inference.run(**{**INFERENCE, "dtype": "float64"})


def test_inference_of_every_variant(tmp_path: Path) -> None:
    compiler = Compiler()
    options = {**INFERENCE, "clock": Clock(), "backend": compiler}
    rows = inference.run(**options, variants=inference.GPU_VARIANTS)
    assert [row.variant for row in rows if isinstance(row, ModelRow)] == [
        *("eager", "folded", "compile", "compile+folded", "eager+graph", "folded+graph")
    ]
    assert compiler.graphs == 2
    for i, row in enumerate(rows):
        assert isinstance(row, ModelRow) and row.p50_ms == pytest.approx(i + 1)
        assert row.batch_norms == (0 if "folded" in row.variant else 6)
        assert (row.mode, row.shape, row.dtype) == ("inference", "2x3x32x32", "float32")
    eager, folded, *others = (row.error for row in rows if isinstance(row, ModelRow))
    assert eager == 0 and 0 < folded < 1e-12
    assert all(1e-9 < error < 1e-4 for error in others)  # rounding in float32
    Record(ENVIRONMENT, models=rows).save(tmp_path / "results.json")
    assert inference.GPU_VARIANTS[:4] == inference.CPU_VARIANTS


def test_inference_in_half_precision_is_held_to_that() -> None:
    options = {**INFERENCE, "dtype": "bfloat16", "clock": Clock()}
    found = inference.compare(**options, channels_last=True)
    assert found.error < 1e-12 and 1e-4 < found.variants["eager"].rounding < 0.1
    assert found.error32 < inference.ROUNDING * found.variants["eager"].rounding
    assert {row.layout for row in found.rows()} == {"NHWC"}


@pytest.mark.parametrize(
    ("wrong", "by", "reason"),
    [
        (torch.float64, 1e-6, "in float64"),  # float32 would not show it
        (torch.float32, 1e-2, "in the dtype that is timed"),
    ],
)
def test_a_wrong_fold_is_not_timed(
    wrong: torch.dtype, by: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = tritonnorm.fold

    def off(model: torch.nn.Module, *args: Any) -> Any:
        folded, report = fold(model, *args)
        with torch.no_grad():
            first = next(folded.parameters())
            first.mul_(1 + by if first.dtype == wrong else 1)
        return folded, report

    monkeypatch.setattr(tritonnorm, "fold", off)
    clock = Clock()
    with pytest.raises(RuntimeError, match=rf"folded: error .* {reason}, expected at most"):
        inference.run(**INFERENCE, clock=clock, variants=("eager", "folded"))
    assert clock.variants == 0


def test_what_torch_cannot_do_is_said() -> None:
    options = {**INFERENCE, "clock": Clock(), "backend": broken_compiler}
    rows = inference.run(**options, variants=("eager", "folded", "torch.fx", "compile"))
    skipped = {row.provider: row.reason for row in rows if isinstance(row, SkippedRow)}
    assert set(skipped) == {"torch.fx", "compile"}
    assert "control flow" in skipped["torch.fx"] and "no such machine" in skipped["compile"]
    options["backend"] = Compiler(1.5)
    *_, compiled = inference.run(**options, variants=("eager", "folded", "compile"))
    assert isinstance(compiled, SkippedRow) and "in the dtype that is timed" in compiled.reason
