"""The compile audit: no spills, no stack, accesses as wide as alignment allows."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from bench.audit import limits
from bench.audit.compile import GPUS, CompileCase, audit, cases, same_code
from bench.audit.tables import compile_summary, compile_table
from bench.call import DIRECTIONS, Call
from bench.report.terminal import plain
from tritonnorm.device import KNOWN
from tritonnorm.kernels import ALGORITHMS, BY_NAME
from tritonnorm.kernels.base import Config
from tritonnorm.tune import prune
from tritonnorm.tune.loops import Loop
from tritonnorm.tune.static import KernelReport

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
    monkeypatch.setitem(limits.ISSUED, "sm_90", limits.ISSUED["sm_90"] / 4)
    assert any("issues for" in fault for row in rows for fault in row.faults)


def test_waits_are_measured_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn loads four vectors of 16 bytes, waits once, and stores as many: an H200 waits for it
    longer, the fewer threads there are to do so at once."""
    call = Call((64, 256, 56, 56), False, activation="relu", training=False)
    (row,) = audit(CompileCase(call, "affine", "sm_90", False, True, ("forward",)))
    (loop,) = row.report.loops
    assert (loop.bytes, loop.loaded, loop.waits) == (8 * 16, 4 * 16, 1)
    assert row.config.splits == 5 and row.report.registers <= 48
    assert (row.warps, row.programs) == (4, 10)  # of 256 * 5; there are registers for more
    seconds = 10 * 128 * 128 / (4.8e12 / 132)
    assert row.wait == pytest.approx(limits.LATENCY / seconds) and not row.faults
    assert replace(row, widths={}).wait == 0  # what touches no activations is not about bytes
    shown = plain(compile_table([row])).split()[-3:]
    assert shown == [f"{row.issue:.2f}", f"{row.wait:.2f}", "1"]
    monkeypatch.setattr(limits, "MOST_WAIT", row.wait / 2)
    assert any("waits for" in fault for fault in row.faults)


def test_what_waits_most_counts() -> None:
    """Of several loops; the code around them only where there is none, as it runs once."""
    few, many = Loop(90, 64, 64, 0.5, True), Loop(900, 256, 128, 4, False)
    report = KernelReport("k", "sm_90", 64, 0, 0, 0, {}, {}, loops=(few, many))
    of_few = limits.wait(report, KNOWN["h200"], 1024)
    assert of_few == pytest.approx(0.5 * limits.LATENCY * 4.8e12 / 132 / (64 * 1024))
    assert limits.wait(replace(report, loops=(many,)), KNOWN["h200"], 1024) == 2 * of_few
    both = replace(report, loops=(few, replace(many, inner=True)))
    assert limits.wait(both, KNOWN["h200"], 1024) == 2 * of_few
    assert limits.wait(replace(report, loops=()), KNOWN["h200"], 512) == 0


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "grid", "programs"),
    [
        (64, 0, 4, 1 << 20, 8),  # registers
        (33, 0, 4, 1 << 20, 12),  # eight at a time
        (255, 0, 8, 1 << 20, 1),
        (16, 0, 4, 1 << 20, 16),  # warps
        (16, 0, 1, 1 << 20, 32),  # programs
        (64, 32 << 10, 4, 1 << 20, 6),  # shared memory
        (64, 37 << 10, 4, 1 << 20, 6),  # with a KB each for the system
        (64, (37 << 10) + 1, 4, 1 << 20, 5),
        (64, 0, 4, 133, 2),  # the launch has no more
        (64, 0, 4, 132, 1),
    ],
)
def test_programs_at_once(
    registers: int, shared: int, warps: int, grid: int, programs: int
) -> None:
    report = KernelReport("k", "sm_90", registers, 0, 0, shared, {}, {})
    assert limits.programs(report, KNOWN["h200"], warps, grid) == programs
    assert limits.programs(report, KNOWN["mi300x"], warps, grid) == 0


def test_a_narrow_access_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hint that a vector divides the contiguous axis, the compiler cannot prove it."""
    geometry = Config.geometry
    monkeypatch.setattr(Config, "geometry", lambda *args: {**geometry(*args), "VEC": 1})
    call = Call((16, 256, 14, 14), False, activation="relu")  # too few samples for rows
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
        ((16, 64, 14, 14), False, torch.bfloat16, "split", 1, 64),
        ((16, 64, 14, 14), False, torch.float32, "split", 1, 128),
        ((16, 64, 7, 7), False, torch.bfloat16, "split", 1, 16),
        ((32, 64, 14, 14), False, torch.bfloat16, "split", 64, 128),  # rows of all planes
        ((32, 64, 7, 7), False, torch.bfloat16, "split", 64, 128),
        ((32, 64, 7, 7), True, torch.bfloat16, "split", 64, 128),
        ((32, 36, 7, 7), True, torch.float16, "split", 64, 64),
        ((32, 3, 7, 7), True, torch.float64, "split", 64, 64),
        ((32, 64, 7, 7), False, torch.bfloat16, "resident", 1, 16),  # one plane
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
