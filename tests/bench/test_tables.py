"""Tables say what the rows say, whole, on a terminal of any width."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from bench.audit.compile import CompileCase, CompileRow
from bench.audit.tables import (
    compile_summary,
    compile_table,
    traffic_summary,
    traffic_table,
)
from bench.audit.traffic import TrafficRow
from bench.call import Call
from bench.report.terminal import show
from tritonnorm.kernels.base import Config
from tritonnorm.tune.static import KernelReport

CALL = Call((3, 16, 28, 28), activation="relu", residual=True, training=False)
CONFIG = Config(1, 4, 64, 13)
TRAFFIC = TrafficRow(
    *(CALL, "affine", "backward", CONFIG, 305_760, 305_760, 152_880),
    tensors={"x": (1, 0)},
    vectors=6_848,
    kernels=("gradient_kernel", "combine_sums_kernel"),
)
REPORT = KernelReport("gradient_kernel", "sm_90", 142, 0, 0, 0, {128: 4}, {128: 4})
COMPILED = CompileRow(
    CompileCase(CALL, "affine", "sm_90"), "backward", CONFIG, 2, REPORT, {"x": 128, "dx": 64}, 8, 64
)


def printed(*what: object, width: int = 60) -> str:
    console = Console(width=width, file=io.StringIO())
    for each in what:
        show(console, each) if not isinstance(each, str) else console.print(each, soft_wrap=True)
    return console.file.getvalue()


def test_traffic() -> None:
    text = printed(traffic_table([TRAFFIC]))
    for part in ("affine", "BN+add+relu (inference)", "3x16x28x28 NCHW bfloat16", "305,760"):
        assert part in text
    assert "2.00" in text and "6,848" in text and "…" not in text
    assert traffic_summary([TRAFFIC]).startswith("All 1 counts equal the model to the byte")
    wrong = replace(TRAFFIC, counted=305_761)
    assert (
        "1 of 2 counts are NOT those of the model: affine backward BN+add+relu"
        in traffic_summary([TRAFFIC, wrong])
    )


def test_compile() -> None:
    text = printed(compile_table([COMPILED, COMPILED]))
    (line,) = [line for line in text.splitlines() if "gradient_kernel" in line]
    assert line.split() == [
        *("affine", "backward", "gradient_kernel"),
        *("2", "142", "0", "0", "64", "64", "2"),
    ]
    assert compile_summary([COMPILED]).startswith("All 1 compiled kernels: no spills")
    spilling = replace(COMPILED, report=replace(REPORT, spills=3, stack=8), widths={"x": 16})
    text = compile_summary([COMPILED, spilling])
    assert text.startswith("1 of 2 compiled kernels have faults")
    assert text.endswith("3 spills, 8 bytes of stack, x is accessed in 16 of 64 bits")
