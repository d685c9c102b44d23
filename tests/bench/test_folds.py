"""Folding the weights of a model on a made-up GPU: checked first, then timed like operations."""

from __future__ import annotations

import functools
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import folds
from bench.commands.files import Outputs
from bench.commands.models import folds as command
from bench.folds import FoldCase, measure
from bench.record.compare import compare
from bench.record.file import Record, load
from bench.runner import Options
from tests.bench.simulated import COPY, FACTS, SHARES, SimulatedGpu
from tritonnorm import folding
from tritonnorm.folding import Folded, Source

PAIRS = (((8, 4, 3, 3), 0, False), ((6, 2, 3, 3), 2, True), ((5, 7), 0, True))
FEW = Options(rounds=5, host=False)


def case(mode: str = "forward+backward", dtype: torch.dtype = torch.float32) -> FoldCase:
    return FoldCase("three", mode, dtype, True, PAIRS)


def test_the_pairs_of_a_real_model() -> None:
    found = FoldCase.of("tiny", "forward", torch.float32, True)
    shapes = [shape for shape, _, _ in found.pairs]
    assert len(shapes) == 6 and shapes[0] == (16, 3, 7, 7)  # the stem, two blocks, one projection
    assert all(groups == 0 and not bias for _, groups, bias in found.pairs)
    weight = found.sources("cpu", None)[1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", folds.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(mode: str, dtype: torch.dtype) -> None:
    one = case(mode, dtype)
    rows, skipped = measure(
        one, SimulatedGpu(), (4800.0, 4200.0), FEW, providers=("tritonnorm", "eager")
    )
    assert skipped == [] and [row.provider for row in rows] == ["tritonnorm", "eager"]
    ours, eager = rows
    # Weights of 288, 108 and 35 elements over 8, 4 and 5 channels; see `folding.minimum_bytes`.
    b, weights, channels, biased = dtype.itemsize, 288 + 108 + 35, 8 + 4 + 5, 4 + 5
    forward = 2 * weights * b + 4 * 4 * channels + b * (channels + biased)
    backward = 3 * weights * b + 5 * 4 * channels + b * (2 * channels + biased)
    expected = {"forward": forward, "backward": backward}.get(mode, forward + backward)
    assert ours.bytes == expected and ours.pairs == 3
    seconds = 2e-6 + expected / (COPY * SHARES["tritonnorm"])
    assert ours.p50_us == pytest.approx(1e6 * seconds, rel=0.02)
    assert ours.x_eager == pytest.approx(eager.p50_us / ours.p50_us)
    assert 0 < ours.error < folds.tolerance(dtype)


@pytest.mark.parametrize(
    ("wrong", "said"),  # results are weight and bias of each of three pairs, then the gradients
    [
        ("weight", "wrong result 0"),
        ("bias", "wrong result 1"),
        ("gradient", "wrong result 6"),
        ("dtype", "result 0 is torch.float64"),
    ],
)
def test_a_wrong_fold_is_not_timed(wrong: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        name = "wrong"

        def setup(self, case: FoldCase) -> folds.Fold:
            return fold

    def fold(sources: list[Source]) -> list[Folded]:
        first, *others = folding.differentiable(sources)
        if wrong == "weight":
            first = replace_folded(first, weight=first.weight * 1.01)
        elif wrong == "bias":
            first = replace_folded(first, bias=first.bias + 0.01)
        elif wrong == "gradient":
            first = replace_folded(first, weight=first.weight.detach() + 0 * sources[0].weight)
        else:
            first = replace_folded(first, weight=first.weight.double())
        return [first, *others]

    def replace_folded(folded: Folded, **parts: torch.Tensor) -> Folded:
        return folded._replace(**parts)

    monkeypatch.setitem(folds.PROVIDERS, "wrong", Wrong())
    gpu = SimulatedGpu()
    rows, skipped = measure(case(), gpu, options=FEW, providers=("wrong",))
    assert rows == [] and gpu.clock.sets == []
    assert [row.provider for row in skipped] == ["wrong"] and said in skipped[0].reason


def test_tensors_take_turns_until_the_cache_is_too_small() -> None:
    one = case()
    gpu = SimulatedGpu(facts=replace(FACTS, l2_bytes=10 * one.footprint))
    rows, _ = measure(one, gpu, options=FEW, providers=("eager",))
    assert gpu.clock.sets == [40] and "C" not in rows[0].flags
    warm = SimulatedGpu(facts=gpu.facts)
    rows, _ = measure(one, warm, options=replace(FEW, warm=True), providers=("eager",))
    assert warm.clock.sets == [1] and "C" in rows[0].flags


def test_the_compiled_expression_is_the_expression() -> None:
    """The form that torch.compile gets, whose own result is checked on a GPU before it is timed."""
    sources = case().sources("cpu", torch.Generator().manual_seed(0))
    columns = list(zip(*sources, strict=True))
    found = folds._folded([list(c) for c in columns[:6]], *columns[6:])
    for pair, expected in zip(found, folding.differentiable(sources), strict=True):
        assert all(map(torch.equal, pair, expected))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(folds.PROVIDERS, "compile")
    monkeypatch.setattr(folds.measure, "__defaults__", ((None, None), FEW, ("tritonnorm", "eager")))
    text, path = io.StringIO(), tmp_path / "folds.json"
    console = Console(file=text, width=200)
    outputs = Outputs(json=path, md=tmp_path / "folds.md")
    assert command(console, ["tiny"], options=FEW, outputs=outputs, machine=SimulatedGpu()) == 0
    frame = load(path, table="folds")
    assert list(frame["mode"]) == [m for m in folds.MODES for _ in range(2)]
    assert (frame["peak_percent"] > 0).all() and (frame["pairs"] == 6).all()
    assert "Folding the weights of a model" in text.getvalue()
    assert "| tiny | backward |" in (tmp_path / "folds.md").read_text(encoding="utf-8")
    record = Record.read(path)
    assert compare(record, record).counts["SAME"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ["nothing"]}, "model: expected one of"),
        ({"dtypes": ["int8"]}, "dtype: expected one of"),
        ({"layouts": ["CHWN"]}, "layout: expected one of"),
    ],
)
def test_names_are_checked_first(arguments: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command(Console(file=io.StringIO()), machine=SimulatedGpu(), **arguments)


@pytest.mark.parametrize("mode", folds.MODES)
def test_the_compiled_peer_runs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward is called again and again, with tensors that it must not give away."""
    by_aot = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", by_aot)
    rows, skipped = measure(case(mode), SimulatedGpu(), options=FEW, providers=("compile",))
    assert skipped == [] and [row.provider for row in rows] == ["compile"]
