"""The compile audit: no spills, no stack, accesses as wide as alignment allows."""

from __future__ import annotations

import re

import pytest
import torch

from bench.audit import compile as compile_audit
from bench.audit.compile import GPUS, CompileCase, audit, cases, same_code
from bench.audit.tables import compile_summary
from bench.call import DIRECTIONS, Call
from tritonnorm.device import KNOWN
from tritonnorm.kernels import ALGORITHMS, BY_NAME
from tritonnorm.kernels.base import Config
from tritonnorm.tune import prune

CASES = cases()


def name(case: CompileCase) -> str:
    c = case.call
    every = "every" if case.every_config else "formula"
    return f"{case.target}-{case.algorithm}-{c.op}-{c.layout}-{c.size}-{c.type}-{every}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_compiles_well(case: CompileCase) -> None:
    rows = audit(case)
    assert not [row for row in rows if row.faults], compile_summary(rows)
    for row in rows:
        assert row.report.target == case.target and row.report.registers > 0
        launches = {("affine", "forward"): 1, ("affine", "backward"): 2}
        expected = {"split": 3, "resident": 1, "persistent": 1}.get(case.algorithm) or launches[
            case.algorithm, row.direction
        ]
        assert row.launches == expected
    if case.every_config:
        device = KNOWN[GPUS[case.target]]
        for direction in DIRECTIONS:
            found = BY_NAME[case.algorithm].configs(case.call.problem(direction), device)
            compiled = {same_code(r.config) for r in rows if r.direction == direction}
            assert compiled == set(map(same_code, found))


def test_every_algorithm_in_both_layouts_for_every_target() -> None:
    every = {(c.algorithm, c.call.channels_last, c.target) for c in CASES if c.every_config}
    assert every == {
        (a.name, channels_last, target)
        for a in ALGORITHMS
        for channels_last in (False, True)
        for target in GPUS
        # its orders take turns with the targets: each has twice as many configurations
        if a.name != "persistent" or channels_last == (target in ("sm_90", "gfx942"))
    }
    assert {c.call.dtype for c in CASES} == {
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    }  # fmt: skip
    vectors = {(c.call.channels_last, c.call.problem("forward").vector) for c in CASES}
    assert {(False, 1), (False, 4), (False, 16), (True, 4), (True, 16)} <= vectors


def test_a_spill_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program too large for its registers, which a formula without a limit would choose."""
    from tritonnorm.kernels import resident

    monkeypatch.setattr(resident, "PAYLOAD", {4: 1 << 20})
    call = Call((32, 64, 28, 28), False, activation="relu", residual=True)
    rows = audit(CompileCase(call, "resident", "sm_90", every_config=False))
    assert any("spills" in fault for row in rows for fault in row.faults)
    assert any("stack" in fault for row in rows for fault in row.faults)
    assert "have faults" in compile_summary(rows)


def test_too_many_instructions_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted for the H200, and more than the bytes leave time for is said."""
    call = Call((64, 256, 56, 56), True, activation="relu")
    case = CompileCase(call, "persistent", "sm_90", every_config=False, disassemble=True)
    rows = audit(case)
    assert all(0.2 < row.issue < 0.8 and not row.faults for row in rows), [r.issue for r in rows]
    monkeypatch.setitem(compile_audit.ISSUED, "sm_90", compile_audit.ISSUED["sm_90"] / 4)
    assert any("issues for" in fault for row in rows for fault in row.faults)


def test_a_narrow_access_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hint that a vector divides the contiguous axis, the compiler cannot prove it."""
    geometry = Config.geometry
    monkeypatch.setattr(Config, "geometry", lambda *args: {**geometry(*args), "VEC": 1})
    call = Call((32, 256, 14, 14), False, activation="relu")
    case = CompileCase(call, "split", "sm_90", every_config=False)
    rows = [row for row in audit(case) if row.widths]
    assert {fault for row in rows for fault in row.faults} >= {
        "x is accessed in 16 of 64 bits", "y is accessed in 16 of 64 bits",
    }  # fmt: skip


def test_a_tensor_that_no_access_is_found_of_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a change of the kernels' wording would leave nothing to check."""
    monkeypatch.setattr(prune, "_ACCESS", re.compile("(a)(b) that never occurs"))
    case = CompileCase(Call((32, 256, 14, 14), activation="relu"), "split", "sm_90", False)
    with pytest.raises(RuntimeError, match="no access found of x, y"):
        audit(case)


@pytest.mark.parametrize(
    ("shape", "channels_last", "dtype", "algorithm", "columns", "bits"),
    [
        ((32, 64, 56, 56), False, torch.bfloat16, "split", 1, 128),
        ((32, 64, 14, 14), False, torch.bfloat16, "split", 1, 64),
        ((32, 64, 14, 14), False, torch.float32, "split", 1, 128),
        ((32, 64, 7, 7), False, torch.bfloat16, "split", 1, 16),
        ((32, 64, 7, 7), True, torch.bfloat16, "split", 64, 128),
        ((32, 36, 7, 7), True, torch.float16, "split", 64, 64),
        ((32, 3, 7, 7), True, torch.float64, "split", 64, 64),
        ((32, 64, 7, 7), False, torch.bfloat16, "resident", 1, 16),
        ((32, 64, 7, 7), False, torch.bfloat16, "resident", 128, 32),  # planes of two channels
        ((32, 64, 7, 7), False, torch.bfloat16, "resident", 512, 128),  # of eight
        ((32, 64, 14, 14), False, torch.bfloat16, "resident", 512, 128),
        ((32, 64, 7, 7), False, torch.bfloat16, "affine", 512, 128),
    ],
)
def test_what_alignment_allows(shape, channels_last, dtype, algorithm, columns, bits) -> None:
    problem = Call(shape, channels_last, dtype).problem("forward")
    config = Config(columns, 1, 64) if columns > 1 else Config(1, 8, 512)
    assert prune.access_width(problem, config, KNOWN["h100"], algorithm) == bits


def test_a_tile_can_be_what_limits_the_width() -> None:
    problem, config = Call((32, 64, 56, 56)).problem("forward"), Config(1, 1, 256)
    assert (
        prune.access_width(problem, config, KNOWN["h100"], "split") == 32
    )  # two elements a thread
    assert prune.access_width(problem, config, KNOWN["mi300x"], "split") == 16


def test_a_case_that_an_algorithm_cannot_run() -> None:
    with pytest.raises(ValueError, match="affine cannot run"):
        audit(CompileCase(Call((32, 64, 56, 56)), "affine", "sm_90"))
