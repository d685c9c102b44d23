"""The tensors to tune on: every candidate passes the check, and one that is wrong does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import tuned
from tritonnorm.device import INTERPRETER, KNOWN
from tritonnorm.kernels import ALGORITHMS, FOLDS, GROUP_ALGORITHMS
from tritonnorm.kernels.group_split import GroupSplit
from tritonnorm.kernels.masked_launches import Masked
from tritonnorm.kernels.split import Split
from tritonnorm.problem import FoldProblem, Problem
from tritonnorm.tune import scratch
from tritonnorm.tune.scratch import NormTrial, sets_for
from tritonnorm.tune.scratch_fold import FoldTrial
from tritonnorm.tune.scratch_group import GroupTrial
from tritonnorm.tune.search import Wrong

CPU, H200 = torch.device("cpu"), KNOWN["h200"]
FUSED = {"activity": "two_valued", "residual": True, "mask": True}
SMALL = replace(INTERPRETER, l2_bytes=1 << 10)


def small(direction: str = "forward", **options: Any) -> Problem:
    return tuned.problem(3, 20, 49, direction=direction, dtype=torch.float32, **options)


PROBLEMS = [
    small(),
    small(channels_last=True, **FUSED),
    small(activity="smooth", residual=True),
    small(batch_statistics=False, activity="two_valued"),
    small("backward", **FUSED, needs_dresidual=True),
    small("backward", channels_last=True, activity="two_valued"),
    small("backward", activity="smooth", residual=True, needs_dresidual=True),
    small("backward", batch_statistics=False, activity="smooth"),
    small("backward", batch_statistics=False, needs_dparams=False, **FUSED),
    replace(small(), dtype=torch.bfloat16),
]


def candidates(p: Problem) -> list[Any]:
    """The first and the last of each algorithm that the interpreter can run."""
    able = [a for a in ALGORITHMS if a.supports(p, INTERPRETER) is None]
    return [
        (a.name, config) for a in able for config in (a.configs(p, H200)[0], a.configs(p, H200)[-1])
    ]


@pytest.mark.parametrize("p", PROBLEMS, ids=lambda p: f"{p.direction} {p.activity} {p.dtype}")
def test_what_is_right_passes(p: Problem) -> None:
    trial = NormTrial(p, CPU, SMALL)
    assert len(trial.sets) >= 2
    for candidate in candidates(p):
        trial.check(candidate)


MASKED = [
    small(form="masked", activity="smooth"),
    small(form="masked", channels_last=True, batch_statistics=False),
    small("backward", form="masked", channels_last=True, activity="two_valued"),
    small("backward", form="masked", batch_statistics=False, activity="smooth"),
    small("backward", form="masked", needs_dx=False),
    small("backward", form="masked", batch_statistics=False, needs_dparams=False),
    replace(small("backward", form="masked"), dtype=torch.bfloat16),
]


@pytest.mark.parametrize("p", MASKED, ids=lambda p: f"{p.direction} {p.activity} {p.dtype}")
def test_sequences(p: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding included; what is written to it is noticed."""
    trial = NormTrial(p, CPU, SMALL)
    configs = Masked().configs(p, H200)
    for config in configs:
        trial.check(("masked", config))
    if p.needs_dx:
        name = "y" if p.direction == "forward" else "dx"
        breaks(monkeypatch, lambda a: getattr(a, name)[:, :, -1].fill_(1.0), Masked)
        with pytest.raises(Wrong, match=f"{name} is wrong"):
            trial.check(("masked", configs[0]))


def test_strided_input() -> None:
    p = tuned.problem(3, 4, 6, dtype=torch.float32)
    p = replace(p, view=replace(p.view, strides=(60, 12, 2)))
    trial = NormTrial(p, CPU, SMALL)
    assert trial.sets[0].x.stride() == (60, 12, 2)
    trial.check(candidates(p)[0])


def breaks(
    monkeypatch: pytest.MonkeyPatch, harm: Callable[[Any], object], kind: Any = Split
) -> None:
    """Split, but something happens to its results."""
    for direction in ("forward", "backward"):
        make = getattr(kind, direction)

        def broken(self: Any, *args: Any, make: Any = make) -> Callable[[Any], None]:
            run = make(self, *args)

            def both(a: Any) -> None:
                run(a)
                harm(a)

            return both

        monkeypatch.setattr(kind, direction, broken)


@pytest.mark.parametrize(
    ("harm", "p", "message"),
    [
        (lambda a: a.y[2, 3, 40:].fill_(float("nan")), PROBLEMS[0], "y is not written everywhere"),
        (lambda a: a.y[1].mul_(2), PROBLEMS[0], "y is wrong"),
        (lambda a: a.rstd.mul_(2), PROBLEMS[0], "rstd is wrong"),
        (lambda a: a.running_var.mul_(2), PROBLEMS[0], "running statistics is wrong"),
        (lambda a: a.mask.fill_(255), PROBLEMS[1], "the mask is wrong"),
        (lambda a: a.dx[0].zero_(), PROBLEMS[4], "dx is wrong"),
        (lambda a: a.dresidual[0].zero_(), PROBLEMS[4], "dresidual is wrong"),
        (lambda a: a.dweight.add_(100), PROBLEMS[4], "dweight is wrong"),
        (lambda a: a.dbias.fill_(float("nan")), PROBLEMS[5], "dbias is not written everywhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_does_not(
    harm: Any, p: Problem, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = NormTrial(p, CPU, SMALL)
    split = ("split", Split().heuristic(p, H200))
    trial.check(split)
    breaks(monkeypatch, harm)
    with pytest.raises(Wrong, match=message):
        trial.check(split)


def test_running_statistics_stay_what_they_were() -> None:
    trial = NormTrial(PROBLEMS[0], CPU, SMALL)
    before = trial.sets[0].running_mean.clone()
    trial.check(candidates(PROBLEMS[0])[0])
    assert torch.equal(trial.sets[0].running_mean, before)


def test_the_sets_exceed_the_cache_and_fit_the_memory() -> None:
    assert sets_for(1 << 20, H200) * (1 << 20) >= H200.l2_bytes
    assert sets_for(1 << 30, H200) == 2
    assert sets_for(1 << 30, H200, free=1 << 30) == 1
    assert sets_for(1 << 10, H200) == 64
    a, b = (NormTrial(PROBLEMS[0], CPU, SMALL).sets[0].x for _ in range(2))
    assert torch.equal(a, b) and float(a.std()) > 0.5  # the same random values each time


KINDS = {"dtype": torch.float32}
GROUPS = [
    tuned.group(3, 12, 5, 7, groups=4, **KINDS, activity="smooth", residual=True),
    tuned.group(3, 12, 4, 4, groups=2, channels_last=True, **KINDS, activity="two_valued"),
    tuned.group(3, 12, 5, 7, groups=12, centred=False, dtype=torch.bfloat16),
    tuned.group(17, 40, **KINDS, centred=False),
    tuned.group(17, 40, **KINDS, residual=True),
]
SIDES = [
    *GROUPS,
    *(
        replace(p, direction="backward", needs_dresidual=p.residual and p.activity != "none")
        for p in GROUPS
    ),
    replace(GROUPS[1], direction="backward", needs_dx=False),
    replace(GROUPS[3], direction="backward", needs_dparams=False),
]


@pytest.mark.parametrize("p", SIDES, ids=lambda p: f"{p.direction} {p.per} {p.activity}")
def test_the_other_norms(p: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one portion and in many: what is right passes."""
    for chunk in (scratch.CHUNK, 100):
        monkeypatch.setattr(scratch, "CHUNK", chunk)
        trial = GroupTrial(p, CPU, SMALL)
        assert len(trial.sets) >= 2
        for algorithm in GROUP_ALGORITHMS:
            for config in algorithm.configs(p, H200)[:: 1 if chunk > 100 else 9]:
                trial.check((algorithm.name, config))


@pytest.mark.parametrize(
    ("harm", "p", "message"),
    [
        (lambda a: a.y[2, 3, 30:].fill_(float("nan")), SIDES[0], "y is not written everywhere"),
        (lambda a: a.y[1].mul_(2), SIDES[1], "y is wrong"),
        (lambda a: a.y[0, :, 9].mul_(2), SIDES[4], "y is wrong"),
        (lambda a: a.rstd[3:].mul_(2), SIDES[3], "rstd is wrong"),
        (lambda a: a.mean[7].add_(2), SIDES[0], "mean is wrong"),
        (lambda a: a.dx[0].zero_(), SIDES[6], "dx is wrong"),
        (lambda a: a.dresidual[2].zero_(), SIDES[5], "dresidual is wrong"),
        (lambda a: a.dweight.add_(100), SIDES[8], "dweight is wrong"),
        (lambda a: a.dbias.fill_(float("nan")), SIDES[10], "dbias is not written everywhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_of_the_other_norms(
    harm: Any, p: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = GroupTrial(p, CPU, SMALL)
    split = ("group_split", GroupSplit().heuristic(p, H200))
    trial.check(split)
    breaks(monkeypatch, harm, GroupSplit)
    with pytest.raises(Wrong, match=message):
        trial.check(split)


@pytest.mark.parametrize("rows", [True, False])
def test_folds(rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p = FoldProblem(torch.float32, torch.float32, torch.float32, 2, 24, 24 * 32, rows)
    trial = FoldTrial(p, CPU, SMALL)
    found = FOLDS[0].configs(p, H200)
    for config in (found[0], found[-1]):
        trial.check(("fold", config))
    trial.calls(("fold", found[0]))[0]()
    made = FoldTrial._made

    def mixed(self: FoldTrial, i: int, candidate: Any) -> tuple[Any, ...]:
        batch, *rest = made(self, i, candidate)
        return replace(batch, work=torch.zeros_like(batch.work), launches={}), *rest

    monkeypatch.setattr(FoldTrial, "_made", mixed)
    with pytest.raises(Wrong, match="w' is not written everywhere"):
        trial.check(("fold", found[0]))
