"""The compile audit of the algorithms for group norms: no spills, no stack, wide accesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.audit.compile import CompileCase, audit
from bench.audit.tables import compile_summary
from bench.norm_call import NormCall

FUSED: dict[str, Any] = {"activation": "silu", "residual": True}
PAIRS = (("sm_80", "gfx942"), ("sm_90", "sm_100"))
# Rows, groups and channels, in both orders, by both algorithms; each for two targets in turn.
CALLS = [
    (NormCall("layer", (4096, 1024), **FUSED), "group_resident"),
    (NormCall("rms", (4096, 4096), dtype=torch.float32), "group_resident"),
    (NormCall("layer", (4096, 8192)), "group_resident"),
    (NormCall("layer", (1 << 14, 64), dtype=torch.float16), "group_resident"),
    (NormCall("rms", (64, 1 << 17), activation="gelu", residual=True), "group_split"),
    (NormCall("layer", (64, 1 << 15), dtype=torch.float64, activation="relu"), "group_split"),
    (NormCall("group", (4, 1280, 16, 16), **FUSED), "group_resident"),
    (NormCall("group", (4, 640, 16, 16), channels_last=True, **FUSED), "group_resident"),
    (NormCall("group", (4, 320, 64, 64), **FUSED), "group_split"),
    (NormCall("group", (4, 320, 64, 64), channels_last=True, **FUSED), "group_split"),
    (NormCall("instance", (8, 64, 32, 32), **FUSED), "group_resident"),
    (NormCall("instance", (8, 64, 16, 16), channels_last=True, **FUSED), "group_resident"),
    (NormCall("instance", (2, 64, 96, 96), dtype=torch.float32, **FUSED), "group_split"),
]
CASES = [
    CompileCase(call, algorithm, target, every_config=False)
    for i, (call, algorithm) in enumerate(CALLS)
    for target in PAIRS[i % 2]
]


def name(case: CompileCase) -> str:
    c = case.call
    return f"{case.target}-{case.algorithm}-{c.op}-{c.layout}-{c.size}-{c.type}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_compiles_well(case: CompileCase) -> None:
    rows = audit(case)
    assert not [row for row in rows if row.faults], compile_summary(rows)
    for row in rows:
        forward, backward = {"group_resident": (1, 2), "group_split": (3, 4)}[case.algorithm]
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
