"""The fake driver records launches and variants, and leaves no trace."""

from __future__ import annotations

import time

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as triton_driver

from bench.lab.fake_driver import fake_driver, host_time
from tests.compiled.sample_kernels import fused_kernel, relu, rows_kernel, scale_kernel, square

# triton 3.9 warns when this is left to its default
FUSION = {"enable_fp_fusion": True}


def scale(n: int, c: int, h: int, **options: int | bool) -> tuple[torch.Tensor, ...]:
    x = torch.empty(n, c, h, h, dtype=torch.bfloat16)
    out, s = torch.empty_like(x), torch.empty(c)
    grid = (triton.cdiv(x.numel(), 2048),)
    scale_kernel[grid](x, out, s, x.numel(), h * h, c, B=2048, **FUSION, **options)
    return x, out, s


def test_launch_record():
    with fake_driver() as log:
        x, out, s = scale(2, 64, 56, num_warps=8, num_stages=2, launch_cooperative_grid=True)
    (record,) = log.launches
    assert (record.kernel, record.grid) == ("scale_kernel", (196, 1, 1))
    assert (record.num_warps, record.num_stages, record.cooperative) == (8, 2, True)
    names = ["x_ptr", "o_ptr", "s_ptr", "n", "HW", "C", "B"]
    assert list(record.arguments) == names
    given = [x, out, s, x.numel(), 56 * 56, 64, 2048]
    assert all(a is b or a == b for a, b in zip(record.arguments.values(), given, strict=True))
    (variant,) = log.variants
    assert variant.signature == dict(
        zip(names, ["*bf16", "*bf16", "*fp32", "i32", "i32", "i32", "constexpr"], strict=True)
    )
    assert variant.constants == {(6,): 2048} and variant.num_warps == 8
    assert all(variant.attributes[(i,)] == [["tt.divisibility", 16]] for i in range(6))


def test_variants_of_five_layer_shapes():
    with fake_driver() as log:
        for shape in ((2, 64, 56), (2, 256, 28), (2, 1024, 14), (2, 2048, 7), (2, 17, 7)):
            scale(*shape)
            scale(*shape)
        rows_kernel[(2, 3)](torch.empty(64), torch.empty(64), 4, V=4, B=16, **FUSION)
    # all sizes multiples of 16; H*W not; C not
    assert (log.variant_count("scale_kernel"), log.variant_count("rows_kernel")) == (3, 1)
    assert log.variant_count() == 4
    assert len(log.launches) == 11
    assert log.launches[-1].grid == (2, 3, 1)


def test_tuples_none_and_functions():
    x, out = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    arguments = {
        "ACT": relu,
        "PAIR": (relu, square),
        "ARGS": (0.5, 1.0),
        "DTYPE": triton.language.float32,
    }
    with fake_driver() as log:
        fused_kernel[(1,)](
            (x, x), None, out, 1e-5, **arguments, FLAG=True, NONE=None, B=1024, **FUSION
        )
    record = log.launches[0].arguments
    assert record["x_ptrs"][1] is x and record["r_ptr"] is None and record["eps"] == 1e-5
    assert record["ACT"] is relu
    assert log.variants[0].signature["eps"] == "fp64"
    assert log.variants[0].signature["r_ptr"] == "constexpr"


def test_each_target_has_its_own_caches_and_nothing_stays():
    before = dict(vars(triton_driver))
    devices = dict(scale_kernel.device_caches)
    targets = [GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)]
    if not triton.__version__.startswith("3.4."):  # which has no AMD linker of its own
        targets.append(GPUTarget("hip", "gfx942", 64))
    for target in targets:
        with fake_driver(target) as log:
            scale(1, 16, 16)
            assert triton_driver.active.get_current_target() == target
        assert log.variant_count() == 1
    assert vars(triton_driver) == before
    assert dict(scale_kernel.device_caches) == devices


def test_the_driver_is_restored_after_an_error():
    before = dict(vars(triton_driver))
    with pytest.raises(KeyError, match="no_such_option"), fake_driver():
        scale(1, 16, 16, no_such_option=1)
    assert vars(triton_driver) == before


def test_shared_memory_limit_is_enforced():
    with fake_driver(shared_memory=-1), pytest.raises(triton.OutOfResources, match="shared memory"):
        scale(1, 16, 16)


def test_host_time_is_the_median_of_real_time():
    measured = host_time(lambda: time.sleep(0.001), calls=5, repeats=3)
    assert 1000 <= measured.least_us <= measured.median_us < 20_000
    assert (measured.calls, measured.repeats) == (5, 3)


def test_host_time_of_a_launch_leaves_no_records():
    x, out, s = (torch.empty(2048) for _ in range(3))
    with fake_driver() as log:
        log.recording = False
        measured = host_time(
            lambda: scale_kernel[(1,)](x, out, s, 2048, 16, 16, B=2048, **FUSION),
            calls=50,
            repeats=3,
        )
    assert log.launches == [] and log.variant_count() == 1
    assert 1 < measured.median_us < 2000


def test_report_of_what_a_launch_ran():
    with fake_driver(GPUTarget("cuda", 80, 32)) as log:
        scale(2, 64, 56, num_warps=8)
        scale(2, 17, 7, num_warps=8)
        scale(2, 64, 56, num_warps=8)
        reports = [log.report(launch) for launch in log.launches]
        quick = log.report(log.launches[0], disassemble=False)
    assert [launch.variant for launch in log.launches] == [0, 1, 0]
    assert reports[0] is reports[2]
    assert {r.target for r in reports} == {"sm_80"}
    assert reports[0].widest == 128 and set(reports[1].stores) == {16}
    assert (quick.registers, quick.stores) == (reports[0].registers, reports[0].stores)
    with pytest.raises(RuntimeError, match="no longer active"):
        log.report(log.launches[0])
