"""The compile audit of group norms and of sequences: no spills, no stack, wide accesses."""

from __future__ import annotations

from typing import Any

import pytest

from bench.audit.compile import CompileCase, audit
from bench.audit.others import other_cases
from bench.audit.tables import compile_summary
from bench.norm_call import NormCall

FUSED: dict[str, Any] = {"activation": "silu", "residual": True}
CASES = other_cases()
LAUNCHES = {"group_resident": (1, 2), "group_split": (3, 4), "masked": (3, 3)}


def name(case: CompileCase) -> str:
    c = case.call
    return f"{case.target}-{case.algorithm}-{c.op}-{c.layout}-{c.size}-{c.type}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_compiles_well(case: CompileCase) -> None:
    rows = audit(case)
    assert not [row for row in rows if row.faults], compile_summary(rows)
    for row in rows:
        forward, backward = LAUNCHES[case.algorithm] if case.call.training else (1, 2)
        assert row.launches == (forward if row.direction == "forward" else backward)
        assert row.report.registers > 0


def test_a_spill_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program too large for its registers, which a formula without a limit would choose."""
    from tritonnorm.kernels import group_resident

    monkeypatch.setattr(group_resident, "PAYLOAD_BACKWARD", {4: 1 << 20})
    call = NormCall("layer", (64, 8192), **FUSED)
    rows = audit(CompileCase(call, "group_resident", "sm_90", every_config=False))
    assert any("spills" in fault for row in rows for fault in row.faults)


def test_a_narrow_access_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hint that a vector divides the contiguous axis, the compiler cannot prove it."""
    from tritonnorm.kernels import group_split

    known = group_split.group_meta
    monkeypatch.setattr(group_split, "group_meta", lambda *a, **k: {**known(*a, **k), "VEC": 1})
    call = NormCall("group", (4, 64, 14, 14), activation="silu")
    rows = audit(CompileCase(call, "group_split", "sm_90", every_config=False))
    assert any("x is accessed in 16 of 64 bits" in fault for row in rows for fault in row.faults)
