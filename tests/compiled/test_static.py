"""The compile report: figures, widths, argument kinds and errors."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from tests.compiled import sample_kernels
from tests.compiled.sample_kernels import (
    broken_kernel,
    fused_kernel,
    relu,
    rows_kernel,
    scale_kernel,
    square,
)
from tritonnorm.tune.pool import KernelSpec, compile_many
from tritonnorm.tune.static import CompileError, inspect_kernel

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
OLD, NEW = VERSION < (3, 5), VERSION >= (3, 9)
TARGETS = ["sm_80", "sm_90", "sm_100"] + ["gfx942"] * (not OLD)  # 3.4 has no AMD linker of its own
SIGNATURE = {
    "x_ptr": "*bf16",
    "o_ptr": "*bf16",
    "s_ptr": "*fp32",
    "n": "i32",
    "HW": "i32",
    "C": "i32",
}
FUSED = {"x_ptrs": ("*bf16", "*bf16"), "r_ptr": None, "o_ptr": "*fp32", "eps": "fp64"}
FUSED_CONSTEXPRS = {
    "ACT": relu,
    "PAIR": (relu, square),
    "ARGS": (0.125, 1),
    "DTYPE": tl.float32,
    "FLAG": True,
    "NONE": None,
    "B": 1024,
}


@pytest.mark.parametrize("target", TARGETS)
def test_aligned_arguments_give_wide_accesses(target):
    report = inspect_kernel(scale_kernel, SIGNATURE, {"B": 2048}, [*SIGNATURE], target)
    assert (report.kernel, report.target) == ("scale_kernel", target)
    per_thread = 1 if target == "gfx942" else 2  # 4 KiB through 4 warps of 64 or 32 threads
    assert report.stores == {128: per_thread}
    assert report.loads[128] == per_thread
    assert report.widest == 128
    assert report.narrow <= 1  # the one scale of the program, which AMD reads with a scalar load
    assert (report.spills, report.stack) == (0, 0)
    assert 8 < report.registers < 64


@pytest.mark.parametrize("target", TARGETS)
def test_an_odd_length_gives_narrow_accesses(target):
    aligned = [name for name in SIGNATURE if name != "n"]
    report = inspect_kernel(scale_kernel, SIGNATURE, {"B": 2048}, aligned, target)
    per_thread = 8 if target == "gfx942" else 16
    assert report.stores == {16: per_thread}
    assert report.loads[16] == per_thread
    assert report.narrow >= 2 * per_thread


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("v", "bits"), [(1, 16), (2, 32), (4, 64), (8, 128)])
def test_widths_follow_the_known_factor(target, v, bits):
    types = {"x_ptr": "*bf16", "o_ptr": "*bf16", "HWv": "i32"}
    report = inspect_kernel(rows_kernel, types, {"V": v, "B": 2048}, ["x_ptr", "o_ptr"], target)
    assert set(report.loads) == set(report.stores) == {bits}
    by_line = {(a.kind, a.bits, a.count) for a in report.accesses}
    assert by_line == {("load", bits, report.loads[bits]), ("store", bits, report.stores[bits])}
    assert all(Path(a.file).name == "sample_kernels.py" for a in report.accesses)
    if NEW:  # see Access
        return
    lines = Path(sample_kernels.__file__).read_text().splitlines()
    assert all("tl.store(o_ptr + p" in lines[a.line - 1] for a in report.accesses)


def test_spills_are_seen():
    tight = inspect_kernel(
        scale_kernel,
        SIGNATURE,
        {"B": 32768},
        [*SIGNATURE],
        "sm_90",
        {"num_warps": 4, "maxnreg": 32},
    )
    assert tight.spills > 100 and tight.stack > 100 and tight.registers <= 32


@pytest.mark.skipif(OLD, reason="triton 3.4 has no AMD linker of its own")
@pytest.mark.parametrize("rows", [2048, 32768])
def test_without_disassembly(rows):
    """Faster, and the same but for where the widths come from; spills are seen all the same."""
    from tritonnorm.tune.static import _source, inspect_compiled

    options = {"num_warps": 4, "maxnreg": 32, "enable_fp_fusion": True}
    source = _source(scale_kernel, SIGNATURE, {"B": rows}, [*SIGNATURE])
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    full, quick = (inspect_compiled(compiled, disassemble=d) for d in (True, False))
    assert quick == full if rows == 32768 else quick.spills == full.spills == quick.stack == 0
    assert quick.registers == full.registers and quick.accesses == full.accesses
    assert quick.widest == full.widest == 128


def test_amd_spills_are_seen():
    report = inspect_kernel(
        scale_kernel, SIGNATURE, {"B": 2**18}, [*SIGNATURE], "gfx942", {"num_warps": 4}
    )
    assert report.spills > 0 and report.stack > 0


@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_of_argument(target):
    report = inspect_kernel(fused_kernel, FUSED, FUSED_CONSTEXPRS, ["x_ptrs", "o_ptr"], target)
    plain = inspect_kernel(
        fused_kernel,
        {**FUSED, "r_ptr": "*fp32"},
        {**FUSED_CONSTEXPRS, "FLAG": False, "NONE": 1},
        ["x_ptrs", "r_ptr", "o_ptr"],
        target,
    )
    assert sum(plain.loads.values()) > sum(report.loads.values()) >= 2
    assert report.stores == plain.stores


def test_alignment_of_tuple_elements_matters():
    wide = inspect_kernel(fused_kernel, FUSED, FUSED_CONSTEXPRS, ["x_ptrs", "o_ptr"])
    narrow = inspect_kernel(fused_kernel, FUSED, FUSED_CONSTEXPRS, ["o_ptr"])
    assert wide.loads == {128: 2} and set(narrow.loads) == {16}


def test_target_objects_and_shared_memory():
    report = inspect_kernel(scale_kernel, SIGNATURE, {"B": 256}, target=GPUTarget("cuda", 89, 32))
    assert (report.target, report.shared) == ("sm_89", 0)


@triton.jit
def pipelined_kernel(x_ptr, o_ptr, n, B: tl.constexpr, S: tl.constexpr):
    i = tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    for k in tl.range(0, n, num_stages=S):
        total += tl.load(x_ptr + k * B + i)
    tl.store(o_ptr + i, total)


@pytest.mark.parametrize("stages", [3, 5])
def test_a_pipelined_loop(stages):
    """Its shared memory is dynamic: the cubin does not name it. A turn loads 32 bytes a thread
    straight to shared memory, all but one of the stages ahead."""
    types = {"x_ptr": "*fp32", "o_ptr": "*fp32", "n": "i32"}
    report = inspect_kernel(pipelined_kernel, types, {"B": 1024, "S": stages}, ["x_ptr", "o_ptr"])
    assert (stages - 1) * 4096 <= report.shared <= stages * 4096
    loop = report.loops[0]
    assert (loop.bytes, loop.loaded, loop.inner) == (32, 32, True)
    assert loop.waits == pytest.approx(1 / (stages - 1))


def test_changed_function_in_a_tuple_is_not_served_from_the_cache():
    from tritonnorm.tune.static import _source

    def key(pair):
        return _source(fused_kernel, FUSED, {**FUSED_CONSTEXPRS, "PAIR": pair}, []).hash()

    before = key((relu, square))
    source = square.src
    square._unsafe_update_src(source.replace("x * x", "x * x * x"))
    try:
        assert key((relu, square)) != before
    finally:
        square._unsafe_update_src(source)
    assert key((relu, square)) == before


@pytest.mark.parametrize("processes", [1, 2])
def test_compile_many_keeps_the_order(processes):
    path = "tests.compiled.sample_kernels:scale_kernel"
    specs = [
        KernelSpec(path, SIGNATURE, {"B": 1024}, tuple(SIGNATURE), target) for target in TARGETS[1:]
    ]
    specs.append(KernelSpec(fused_kernel, FUSED, FUSED_CONSTEXPRS, ("x_ptrs", "o_ptr")))
    reports = compile_many(specs, processes)
    assert [r.target for r in reports] == [*TARGETS[1:], "sm_90"]
    assert reports[-1] == inspect_kernel(fused_kernel, FUSED, FUSED_CONSTEXPRS, ["x_ptrs", "o_ptr"])
    assert pickle.loads(pickle.dumps(reports)) == reports


@triton.jit
def unreachable_kernel(x_ptr):
    tl.store(x_ptr, 0)


def test_bad_input():
    with pytest.raises(ValueError, match="n: expected a type or a constexpr value"):
        inspect_kernel(scale_kernel, {k: v for k, v in SIGNATURE.items() if k != "n"}, {"B": 16})
    with pytest.raises(ValueError, match="W: expected a parameter of scale_kernel"):
        inspect_kernel(scale_kernel, SIGNATURE, {"B": 16, "W": 1})
    with pytest.raises(ValueError, match="m: expected a parameter"):
        inspect_kernel(scale_kernel, SIGNATURE, {"B": 16}, ["m"])
    with pytest.raises(ValueError, match="target: expected 'sm_<number>'"):
        inspect_kernel(scale_kernel, SIGNATURE, {"B": 16}, target="h100")
    with pytest.raises(ValueError, match="expected 'module:name'"):
        inspect_kernel("scale_kernel", SIGNATURE, {"B": 16})
    with pytest.raises(ValueError, match="expected a jit function at"):
        inspect_kernel("tests.compiled.sample_kernels:missing", SIGNATURE)
    unnamed = triton.jit(unreachable_kernel.fn)
    with pytest.raises(ValueError, match="expected an attribute of an importable module"):
        compile_many([KernelSpec(unnamed, {"x_ptr": "*fp32"})] * 2, processes=2)


def test_compiler_errors_name_the_kernel():
    with pytest.raises(CompileError, match=r"kernel broken_kernel for sm_90 with .*num_warps.: 2"):
        inspect_kernel(broken_kernel, {"x_ptr": "*fp32"}, {"B": 16}, options={"num_warps": 2})


GUARD = """
from tritonnorm.tune.pool import KernelSpec, compile_many
from tritonnorm.tune.static import inspect_kernel
if __name__ == "__main__":
    path = "tests.compiled.sample_kernels:rows_kernel"
    types = {"x_ptr": "*bf16", "o_ptr": "*bf16", "HWv": "i32"}
    try:
        inspect_kernel(path, types, {"V": 8, "B": 2048}, ["x_ptr", "o_ptr"])
    except RuntimeError as error:
        print("refused:", error)
    spec = KernelSpec(path, types, {"V": 8, "B": 2048}, ["x_ptr", "o_ptr"])
    print([r.widest for r in compile_many([spec], processes=2)])
    import os
    print(os.environ["TRITON_INTERPRET"])
"""


def test_an_interpreting_process_is_refused_but_can_use_a_pool(tmp_path):
    script = tmp_path / "guard.py"
    script.write_text(GUARD)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "refused: TRITON_INTERPRET is on in this process" in done.stdout
    assert "[128]\n1\n" in done.stdout
