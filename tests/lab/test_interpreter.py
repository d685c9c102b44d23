"""The interpreter does what torch and the hardware do."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

from bench.lab import interpreter

BLOCK = 1024


@triton.jit
def cast_kernel(x_ptr, y_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def rounded_cast_kernel(x_ptr, y_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16, fp_downcast_rounding="rtne"))


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, o_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    a = tl.load(a_ptr + i)
    b = tl.load(b_ptr + i)
    tl.store(o_ptr + i, a + b)
    tl.store(o_ptr + B + i, a * b)
    tl.store(o_ptr + 2 * B + i, tl.where(a < b, a, b))
    tl.store(o_ptr + 3 * B + i, tl.abs(a) - 1.5)


@triton.jit
def reduce_kernel(x_ptr, o_ptr, B: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, B))
    tl.store(o_ptr, tl.sum(x, 0))
    tl.store(o_ptr + 1, tl.max(x, 0))


@triton.jit
def full_kernel(o_ptr, B: tl.constexpr):
    tl.store(o_ptr + tl.arange(0, B), tl.full([B], 1.2345, tl.bfloat16))


@triton.jit
def assert_kernel(limit):
    tl.device_assert(tl.program_id(0) < limit, "too many programs")


@triton.jit
def offset_kernel(o_ptr, stride, rows):
    i = tl.arange(0, 16)
    tl.store(o_ptr + i, i * stride, mask=i < rows)


@triton.jit
def loop_kernel(o_ptr, n):
    total = 0
    for k in range(n):
        total += k
    tl.store(o_ptr, total)


@triton.jit
def scalar_kernel(o_ptr, plain, double: tl.float64, flag):
    zero = tl.zeros([1], tl.float64)
    i = tl.arange(0, 1)
    tl.store(o_ptr + i, zero + plain)
    tl.store(o_ptr + 1 + i, zero + double)
    kept = double
    tl.store(o_ptr + 2 + i, zero + kept)
    tl.store(o_ptr + 3 + i, zero + plain.to(tl.float64))
    if flag:
        tl.store(o_ptr + 4 + i, zero + 1)


@triton.jit
def sum_tuple_kernel(x_ptrs, scales, o_ptr, none_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    for k in tl.static_range(len(x_ptrs)):
        total += tl.load(x_ptrs[k] + i) * scales[k]
    if none_ptr is not None:
        total += tl.load(none_ptr + i)
    tl.debug_barrier()
    tl.store(o_ptr + i, total)


@triton.jit
def double_of(x):
    return x + x


@triton.jit
def apply_kernel(x_ptr, o_ptr, F: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o_ptr + i, F(tl.load(x_ptr + i)))


@triton.jit
def rsqrt_of(x):
    return tl.rsqrt(x)


@triton.jit
def erf_of(x):
    return tl.math.erf(x)


@triton.jit
def sigmoid_of(x):
    return tl.sigmoid(x)


@triton.jit
def exp_of(x):
    return tl.exp(x)


def special_values() -> torch.Tensor:
    """Random fp32 bit patterns and the values where rounding goes wrong first."""
    bits = np.random.default_rng(0).integers(0, 2**32, BLOCK - 16, dtype=np.uint32)
    # zeros, infinities, NaNs, the largest, subnormals, ties and what is next to them
    odd = (
        "00000000 80000000 7F800000 FF800000 7FC00000 7F800001 7FFFFFFF 7F7FFFFF "
        "00000001 00018000 00008000 007FFFFF 3FFFF8D5 3F808000 3F818000 3F808001"
    )
    bits = np.append(bits, np.array([int(word, 16) for word in odd.split()], dtype=np.uint32))
    return torch.from_numpy(bits.view(np.float32))


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    integer = torch.int16 if got.element_size() == 2 else torch.int32
    assert torch.equal(got[~nan].view(integer), expected[~nan].view(integer))


@pytest.mark.parametrize("kernel", [cast_kernel, rounded_cast_kernel])
def test_float32_to_bfloat16_is_torch_bit_for_bit(kernel):
    x = special_values()
    y = torch.empty(BLOCK, dtype=torch.bfloat16)
    kernel[(1,)](x, y, BLOCK)
    assert_same_bits(y, x.bfloat16())


def test_every_bfloat16_is_widened_exactly():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = patterns.view(torch.bfloat16)
    y = torch.empty(x.numel(), dtype=torch.float32)
    cast_kernel[(1,)](x, y, x.numel())
    assert_same_bits(y, x.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_bfloat16_to_and_from_other_types(dtype):
    x = torch.linspace(-300, 300, BLOCK).to(dtype)
    y = torch.empty(BLOCK, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, BLOCK)
    assert torch.equal(y, x.bfloat16())
    back = torch.empty(BLOCK, dtype=dtype)
    cast_kernel[(1,)](y, back, BLOCK)
    assert torch.equal(back, y.to(dtype))


def test_bfloat16_arithmetic_is_torch_bit_for_bit():
    a, b = special_values().bfloat16(), special_values().flip(0).bfloat16()
    out = torch.empty(4, BLOCK, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](a, b, out, BLOCK)
    expected = torch.stack([a + b, a * b, torch.where(a < b, a, b), a.abs() - 1.5])
    assert_same_bits(out.flatten(), expected.flatten())


def test_bfloat16_reductions_and_constants():
    x = torch.arange(64, dtype=torch.float32).bfloat16() / 4
    out = torch.empty(2, dtype=torch.bfloat16)
    reduce_kernel[(1,)](x, out, 64)
    assert out.tolist() == [x.float().sum().bfloat16().item(), x.max().item()]
    full = torch.empty(16, dtype=torch.bfloat16)
    full_kernel[(1,)](full, 16)
    assert torch.equal(full, torch.full((16,), 1.2345, dtype=torch.bfloat16))


def test_device_assert_is_active():
    assert_kernel[(2,)](2)
    with pytest.raises(Exception, match="too many programs"):
        assert_kernel[(3,)](2)


def test_int32_overflow_is_caught():
    out = torch.zeros(16, dtype=torch.int32)
    offset_kernel[(1,)](out, 2**27, 16)
    with pytest.raises(Exception, match="overflow"):
        offset_kernel[(1,)](out, 2**28, 16)


def test_range_with_run_time_length():
    out = torch.zeros(1, dtype=torch.int32)
    loop_kernel[(1,)](out, 10)
    assert out.item() == 45


def test_scalars_have_the_precision_of_the_hardware():
    value = 1e-5
    out = torch.zeros(5, dtype=torch.float64)
    scalar_kernel[(1,)](out, value, value, True)
    single = torch.tensor(value, dtype=torch.float32).double().item()
    assert out.tolist() == [single, value, value, single, 1.0]
    out.zero_()
    scalar_kernel[(1,)](o_ptr=out, double=value, plain=value, flag=False)
    assert out.tolist() == [single, value, value, single, 0.0]


def test_tuples_of_tensors_and_none():
    xs = tuple(torch.randn(16) for _ in range(3))
    out = torch.empty(16)
    sum_tuple_kernel[(1,)](xs, (1.0, 2.0, 0.5), out, None, 16)
    torch.testing.assert_close(out, xs[0] + 2 * xs[1] + 0.5 * xs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (rsqrt_of, torch.rsqrt),
        (erf_of, torch.erf),
        (sigmoid_of, torch.sigmoid),
        (exp_of, torch.exp),
        (double_of, lambda x: 2 * x),
    ],
)
def test_math_functions_as_constexpr(function, expected, dtype):
    x = torch.linspace(0.1, 3, 16, dtype=dtype)
    out = torch.empty_like(x)
    apply_kernel[(1,)](x, out, function, 16)
    torch.testing.assert_close(out, expected(x), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_no_numpy_warnings_and_patches_undone_after_a_launch():
    before = tl.load
    x = torch.tensor([-1000.0, 1000.0] * 8)
    out = torch.empty_like(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_kernel[(1,)](x, out, exp_of, 16)
    assert torch.equal(out, torch.exp(x))
    assert tl.load is before
    if hasattr(stock, "_LangPatchScope"):  # triton 3.4 never undoes its patches
        assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.core.load)


def test_install_twice_changes_nothing():
    before = (stock.InterpreterBuilder.cast_impl, stock.GridExecutor.__call__, stock._patch_lang)
    interpreter.install()
    assert before == (
        stock.InterpreterBuilder.cast_impl,
        stock.GridExecutor.__call__,
        stock._patch_lang,
    )
