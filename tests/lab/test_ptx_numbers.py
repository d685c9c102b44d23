"""What an instruction computes is what PyTorch and Python have for it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.lab.ptx_text import at, launch

REGISTERS = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}
WIDTHS = {torch.int8: 8, torch.uint8: 8, torch.int16: 16, torch.float16: 16, torch.bfloat16: 16,
          torch.int32: 32, torch.float32: 32, torch.int64: 64, torch.float64: 64}  # fmt: skip


def calculated(opcode: str, inputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The result of an instruction for every element of some tensors, a thread each."""
    count, out = inputs[0].numel(), torch.empty(inputs[0].shape, dtype=dtype)
    body, names = [], []
    for i, t in enumerate([*inputs, out]):
        bits = WIDTHS[t.dtype]
        names.append(f"{REGISTERS[bits]}{10 + i}")
        body.append(at(i + 1, bits // 8, 20 + i))
        if t is not out:
            body.append(f"ld.global.b{bits} {names[i]}, [%rd{20 + i}];")
    body.append(f"{opcode} {', '.join([names[-1], *names[:-1]])};")
    body.append(f"st.global.b{WIDTHS[dtype]} [%rd{20 + len(inputs)}], {names[-1]};")
    launch("\n".join(body), *inputs, out, threads=count)
    return out


def bits(*patterns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    whole = torch.tensor([p - (1 << 32) * (p >> 31) for p in patterns], dtype=torch.int32)
    return whole.view(dtype)


SPECIAL = bits(
    0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x00000001, 0x00800000,
    0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x3F808001, 0x477FF000, 0x33000000, 0x387FE000, 0xBF800000,
)  # fmt: skip
GENERATOR = torch.Generator().manual_seed(0)
FLOATS = torch.cat(
    [SPECIAL, torch.randn(240, generator=GENERATOR) * 10.0 ** torch.arange(-6, 6).repeat(20)]
)
OTHERS = FLOATS[torch.randperm(256, generator=GENERATOR)]
INTEGERS = torch.randint(-(1 << 31), 1 << 31, (256,), generator=GENERATOR, dtype=torch.int64).int()
INTEGERS[:4] = torch.tensor([0, -1, -(1 << 31), (1 << 31) - 1], dtype=torch.int32)
AMOUNTS = torch.arange(256, dtype=torch.int32) % 40


def same(a: Tensor, b: Tensor) -> None:
    """To the bit, but for the bits of a NaN; the sign of a zero counts."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if a.is_floating_point():
        number = ~a.isnan()
        assert torch.equal(a.signbit()[number], b.signbit()[number])


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("add.f32", FLOATS + OTHERS),
        ("sub.f32", FLOATS - OTHERS),
        ("mul.f32", FLOATS * OTHERS),
        ("div.full.f32", FLOATS / OTHERS),
        ("max.NaN.f32", torch.maximum(FLOATS, OTHERS)),
        ("min.NaN.f32", torch.minimum(FLOATS, OTHERS)),
        ("max.f32", torch.fmax(FLOATS, OTHERS)),
    ],
)
def test_two_floats(opcode: str, expected: Tensor) -> None:
    found = calculated(opcode, [FLOATS, OTHERS], torch.float32)
    zeros = (FLOATS == 0) & (OTHERS == 0)  # PyTorch takes either
    same(found[~zeros], expected[~zeros])
    if opcode == "max.f32":
        zero = torch.zeros(32)
        assert not calculated(opcode, [-zero, zero], torch.float32).signbit().any()
        assert not calculated(opcode, [zero, -zero], torch.float32).signbit().any()


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("cvt.rn.bf16.f32", FLOATS.bfloat16()),
        ("cvt.rn.f16.f32", FLOATS.half()),
        ("cvt.f64.f32", FLOATS.double()),
        ("neg.f32", -FLOATS),
        ("abs.f32", FLOATS.abs()),
        ("sqrt.approx.f32", FLOATS.double().sqrt().float()),
    ],
)
def test_one_float(opcode: str, expected: Tensor) -> None:
    same(calculated(opcode, [FLOATS], expected.dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, 64, dtype=torch.int16).view(dtype)
    name = "f16" if dtype == torch.float16 else "bf16"
    same(calculated(f"cvt.f32.{name}", [every], torch.float32), every.float())
    pair = calculated(f"cvt.rn.{name}x2.f32", [FLOATS, OTHERS], torch.int32)
    upper, lower = pair.view(dtype)[1::2], pair.view(dtype)[::2]
    same(upper, FLOATS.to(dtype))  # the first operand
    same(lower, OTHERS.to(dtype))


def test_fused() -> None:
    """One rounding: the product is exact."""
    a, b = torch.full((32,), 1.0 + 2**-12), torch.full((32,), 1.0 - 2**-12)
    found = calculated("fma.rn.f32", [a, b, torch.full((32,), -1.0)], torch.float32)
    assert found[0] == -(2.0**-24)


def test_packed() -> None:
    a, b = FLOATS.view(torch.int64), OTHERS.view(torch.int64)
    same(calculated("mul.f32x2", [a, b], torch.int64).view(torch.float32), FLOATS * OTHERS)


@pytest.mark.parametrize("how", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_with_nan(how: str) -> None:
    """Ordered ones are false, those with u are true."""
    plain = {
        "eq": "__eq__",
        "ne": "__ne__",
        "lt": "__lt__",
        "le": "__le__",
        "gt": "__gt__",
        "ge": "__ge__",
    }
    numbers = ~(FLOATS.isnan() | OTHERS.isnan())
    expected = getattr(FLOATS, plain[how])(OTHERS)
    for name, answer in ((how, expected & numbers), (f"{how}u", expected | ~numbers)):
        body = f"""
        {at(1, 4, 20)} {at(2, 4, 21)} {at(3, 4, 22)}
        ld.global.b32 %r10, [%rd20]; ld.global.b32 %r11, [%rd21];
        setp.{name}.f32 %p1, %r10, %r11;
        selp.b32 %r12, 1, 0, %p1;
        st.global.b32 [%rd22], %r12;"""
        out = torch.empty(256, dtype=torch.int32)
        launch(body, FLOATS, OTHERS, out, threads=256)
        assert torch.equal(out.bool(), answer)


def unsigned(t: Tensor) -> list[int]:
    return [v % (1 << 32) for v in t.tolist()]


def signed(values: Sequence[int]) -> Tensor:
    return torch.tensor(
        [(v + (1 << 31)) % (1 << 32) - (1 << 31) for v in values], dtype=torch.int32
    )


def field(value: int, start: int, length: int, negative: bool) -> int:
    """The definition of bfe, bit by bit."""
    sign = negative and length > 0 and value >> min(start + length - 1, 31) & 1
    return sum(
        ((value >> start + i if i < length and start + i < 32 else sign) & 1) << i
        for i in range(32)
    )


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("shl.b32", lambda a, n: a << n if n < 32 else 0),
        ("shr.u32", lambda a, n: a >> n if n < 32 else 0),
        ("shr.s32", lambda a, n: (a - (a >> 31 << 32)) >> min(n, 31)),
    ],
)
def test_shifts(opcode: str, function: object) -> None:
    found = calculated(opcode, [INTEGERS, AMOUNTS], torch.int32)
    pairs = zip(unsigned(INTEGERS), AMOUNTS.tolist(), strict=True)
    assert torch.equal(found, signed([function(a, n) for a, n in pairs]))  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_fields(kind: str) -> None:
    length = (AMOUNTS * 7) % 37
    found = calculated(f"bfe.{kind}", [INTEGERS, AMOUNTS, length], torch.int32)
    rows = zip(unsigned(INTEGERS), AMOUNTS.tolist(), length.tolist(), strict=True)
    assert torch.equal(found, signed([field(a, s, n, kind == "s32") for a, s, n in rows]))


def inserted(value: int, into: int, start: int, length: int) -> int:
    """The definition of bfi, bit by bit."""
    places = range(start, min(start + length, 32))
    return sum(((value >> i - start if i in places else into >> i) & 1) << i for i in range(32))


def test_fields_that_are_inserted() -> None:
    into, length = INTEGERS.flip(0).contiguous(), (AMOUNTS * 7) % 37
    found = calculated("bfi.b32", [INTEGERS, into, AMOUNTS, length], torch.int32)
    rows = zip(
        *(unsigned(INTEGERS), unsigned(into), AMOUNTS.tolist(), length.tolist()), strict=True
    )
    assert torch.equal(found, signed([inserted(*row) for row in rows]))


def test_bytes() -> None:
    other, selector = INTEGERS.flip(0).contiguous(), INTEGERS * 3

    def permuted(a: int, b: int, s: int) -> int:
        source = struct.pack("<II", a, b)
        chosen = [(source[s >> 4 * i & 7], s >> 4 * i & 8) for i in range(4)]
        return sum((0xFF * (v >> 7) if sign else v) << 8 * i for i, (v, sign) in enumerate(chosen))

    found = calculated("prmt.b32", [INTEGERS, other, selector], torch.int32)
    rows = zip(unsigned(INTEGERS), unsigned(other), unsigned(selector), strict=True)
    assert torch.equal(found, signed([permuted(*row) for row in rows]))


def test_integers() -> None:
    other = INTEGERS.flip(0).contiguous()
    wide = INTEGERS.long() * other.long()
    assert torch.equal(calculated("mul.wide.s32", [INTEGERS, other], torch.int64), wide)
    assert torch.equal(calculated("mul.lo.s32", [INTEGERS, other], torch.int32), INTEGERS * other)
    quotient = torch.div(INTEGERS.long(), other.long() | 1, rounding_mode="trunc")
    assert torch.equal(calculated("div.s32", [INTEGERS, other | 1], torch.int32), quotient.int())
    assert torch.equal(calculated("cvt.s64.s32", [INTEGERS], torch.int64), INTEGERS.long())
    found = calculated("cvt.u64.u32", [INTEGERS], torch.int64)
    assert found.tolist() == unsigned(INTEGERS)
    funnel = calculated("shf.l.wrap.b32", [INTEGERS, other, AMOUNTS], torch.int32)
    rows = zip(unsigned(INTEGERS), unsigned(other), AMOUNTS.tolist(), strict=True)
    assert torch.equal(
        funnel, signed([(high << 32 | low) << n % 32 >> 32 for low, high, n in rows])
    )
