"""Candidates dropped by their machine code: what is compiled is what the library launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.call import Call
from bench.lab.fake_driver import fake_driver
from bench.norm_call import NormCall
from tests import tuned
from tritonnorm import force_plan
from tritonnorm.device import KNOWN, simulated
from tritonnorm.kernels.base import Config
from tritonnorm.kernels.folding import USUAL
from tritonnorm.tune import prune as pruning
from tritonnorm.tune.jobs import candidates_for
from tritonnorm.tune.pool import compile_many
from tritonnorm.tune.prune import prune, specs
from tritonnorm.tune.static import KernelReport

CALLS: list[Any] = [
    Call((4, 48, 14, 14), False, activation="relu", residual=True),
    Call((1, 64, 28, 28), True, activation="silu"),
    Call((4, 20, 7, 7), False, training=False, activation="relu"),
    NormCall("group", (4, 64, 14, 14), 8, activation="silu", residual=True),
    NormCall("layer", (64, 256)),
    NormCall("rms", (32, 1 << 15)),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_what_is_compiled_is_what_would_be_launched(call: Call | NormCall) -> None:
    """To the last register. On AMD, Triton also looks at the bytes of a tensor."""
    device, tensors = KNOWN["h200"], call.tensors()
    for direction in ("forward", "backward"):
        problem = call.problem(direction)
        candidate = candidates_for(problem, device)[0]
        found = compile_many(specs(problem, candidate, "sm_90"))
        with simulated(device), fake_driver() as log, force_plan(*candidate):
            y = tensors.forward()
            if direction == "backward":
                log.launches.clear()
                tensors.backward(y)
            assert found == [log.report(launch, disassemble=False) for launch in log.launches]


def test_a_fold() -> None:
    (problem, config) = (replace(tuned.FOLD, elements=1 << 16), USUAL)
    reports = compile_many(specs(problem, ("fold", config), "sm_90"))
    assert [r.kernel for r in reports] == ["fold_kernel", "fold_gradient_kernel"]
    assert not any(r.spills or r.stack for r in reports)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_every_way_to_fold_compiles_without_spills(dtype: torch.dtype) -> None:
    wide = dtype if dtype == torch.float64 else torch.float32
    p = replace(tuned.FOLD, dtype=dtype, affine=wide, statistics=wide)
    device = KNOWN["h200"]
    ((_, result),) = prune({"fold": (p, candidates_for(p, device))}, device)
    assert not result.reasons


def test_spills_and_narrow_accesses_are_dropped() -> None:
    p, device = tuned.problem(8, 64, 784), KNOWN["h200"]
    good = candidates_for(p, device)[0]
    spilling = ("split", Config(1, 32, 2048, 1, 4))
    said: list[tuple[int, int]] = []
    ((name, result),) = prune(
        {"x": (p, [good, spilling])}, device, progress=lambda *at: said.append(at)
    )
    assert name == "x" and result.kept == [good] and result.reasons == {"spills registers": 1}
    assert said[-1][0] == said[-1][1] == len(said)


def test_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    p, device = tuned.problem(8, 64, 784), KNOWN["h200"]
    report = KernelReport("k", "sm_90", 64, 0, 0, 0, {128: 2}, {128: 1})
    config = Config(1, 8, 256)

    def of(widths: dict[str, int], **options: Any) -> list[str]:
        monkeypatch.setattr(pruning, "widths", lambda report: widths)
        return pruning.faults(p, config, device, replace(report, **options))

    assert of({"x": 128, "y": 128}) == []
    assert of({"x": 128, "y": 64}) == ["loses vector width"]
    assert of({"x": 128, "mask": 8}) == []
    assert of({}, stack=8) == ["spills registers"]


@pytest.mark.slow
def test_shared_kernels_are_compiled_once_in_a_pool() -> None:
    device = KNOWN["h200"]
    problems = {n: tuned.problem(n, 64, 784) for n in (8, 16, 24)}
    todo = {}
    for n, p in problems.items():
        splits = [c for c in candidates_for(p, device) if c[0] == "split"]
        todo[n] = (p, splits[:2])  # whose combines are the same
    said: list[tuple[int, int]] = []
    found = dict(prune(todo, device, 2, lambda *at: said.append(at)))
    alone = dict(prune(todo, device))
    assert {n: r.kept for n, r in found.items()} == {n: r.kept for n, r in alone.items()}
    every = sum(len(specs(p, c, "sm_90")) for p, cs in todo.values() for c in cs)
    assert said[-1][1] < every
