"""What an instruction computes: opcode -> types of its operands, and a function of their values.

After NVIDIA's "Parallel Thread Execution ISA". Approximate instructions (``ex2.approx``,
``div.full``) are computed exactly here, and a fused multiply-add of float32 in float64, which
rounds twice in rare cases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.lab.ptx.values import Array, convert, width

__all__ = ["Operation", "looked_up", "operation"]


@dataclass(frozen=True)
class Operation:
    """Types of the operands and of the result, and the function from one to the other."""

    sources: tuple[str, ...]
    target: str
    compute: Callable[..., Array]


def _is_float(kind: str) -> bool:
    return "f" in kind


def _shift(compute: Callable[[Array, Array], Array], bits: int) -> Callable[[Array, Array], Array]:
    """Shifts by the width or more give what shifting one by one would."""

    def shifted(a: Array, by: Array) -> Array:
        most = np.minimum(by, bits - 1).astype(a.dtype)
        found = compute(a, most)
        if a.dtype.kind == "i":
            return found
        return np.where(by >= bits, a.dtype.type(0), found)

    return shifted


def _fused(kind: str) -> Callable[[Array, Array, Array], Array]:
    wide: Any = np.longdouble if kind == "f64" else np.float64
    narrow: Any = np.float64 if kind == "f64" else np.float32
    return lambda a, b, c: (a.astype(wide) * b + c).astype(narrow)


def _divided(a: Array, b: Array) -> Array:
    """Towards zero, as C does; by zero, all ones."""
    divisor = np.where(b == 0, 1, b).astype(b.dtype)
    below = (a % divisor != 0) & ((a < 0) != (divisor < 0))  # numpy rounds down
    return np.where(b == 0, ~a.dtype.type(0), a // divisor + below)


def _extreme(compute: Any, sign: float) -> Callable[[Array, Array], Array]:
    """fmin or fmax, for which -0 is less than +0."""

    def found(a: Array, b: Array) -> Array:
        zero = (a == 0) & (b == 0)
        return np.where(zero, np.where(np.signbit(a) == (sign < 0), a, b), compute(a, b))

    return found


def _field(signed: bool, bits: int) -> Callable[[Array, Array, Array], Array]:
    def extracted(a: Array, start: Array, length: Array) -> Array:
        begin, size = start & 0xFF, length & 0xFF
        wide = a.astype(np.int64 if signed else np.uint64)
        taken = (wide >> np.minimum(begin, 63).astype(wide.dtype)) & (
            (np.ones_like(wide) << np.minimum(size, 63).astype(wide.dtype)) - wide.dtype.type(1)
        )
        if not signed:
            return taken
        top = np.minimum(begin + size, bits) - 1
        negative = (size > 0) & ((wide >> np.minimum(top, 63).astype(wide.dtype)) & 1 == 1)
        return np.where(
            negative, taken | (np.int64(-1) << np.minimum(size, 63).astype(np.int64)), taken
        )

    return extracted


def _inserted(a: Array, b: Array, start: Array, length: Array) -> Array:
    """``bfi``: b with the low bits of a in a place of their own."""
    begin, size = (np.minimum(n & 0xFF, 32).astype(np.uint64) for n in (start, length))
    of = ((np.uint64(1) << size) - np.uint64(1)) << begin
    return (b.astype(np.uint64) & ~of) | (a.astype(np.uint64) << begin & of)


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    found = np.zeros(np.broadcast(both, selector).shape, np.uint64)
    for i in range(4):
        chosen = (selector >> np.uint32(4 * i)).astype(np.uint64)
        byte = (both >> (np.uint64(8) * (chosen & np.uint64(7)))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        found |= np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return found


def _funnel(left: bool, clamp: bool) -> Callable[[Array, Array, Array], Array]:
    def shifted(low: Array, high: Array, by: Array) -> Array:
        count = (np.minimum(by, 32) if clamp else by & np.uint32(31)).astype(np.uint64)
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        return (both << count) >> np.uint64(32) if left else both >> count

    return shifted


def looked_up(table: int) -> Operation:
    """``lop3``: of three bits, the one that a table of eight has for them."""

    def found(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros_like(a | b | c)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    return Operation(("b32",) * 3, "b32", found)


_FLOAT: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp": lambda a: 1 / a, "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos,
    "tanh": np.tanh, "min": _extreme(np.fmin, -1), "max": _extreme(np.fmax, 1),
    "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip
_INTEGER: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": lambda a: ~a + a.dtype.type(1),
    "div": _divided, "rem": lambda a, b: a - _divided(a, b) * b, "abs": np.abs,
    "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert,
    "mad": lambda a, b, c: a * b + c,
    "popc": lambda a: np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1)
    .sum(-1, dtype=np.uint32),
}  # fmt: skip
_ORDERED: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
_JOINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_UNARY = {
    *("neg", "abs", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh", "not", "popc"),
}


def _compared(how: str, is_float: bool) -> Callable[[Array, Array], Array]:
    """Of floats an ordered comparison with NaN is false, but ``ne`` as well; one with u is true."""
    if not is_float:
        return _ORDERED[how]

    def unordered(a: Array, b: Array) -> Array:
        return np.isnan(a) | np.isnan(b)

    if how in ("num", "nan"):
        return lambda a, b: unordered(a, b) == (how == "nan")
    plain = _ORDERED[how.removesuffix("u")]
    if how.endswith("u"):
        return lambda a, b: plain(a, b) | unordered(a, b)
    return lambda a, b: plain(a, b) & ~unordered(a, b)


def _kinds(modifiers: list[str]) -> list[str]:
    return [m for m in modifiers if m == "pred" or m.lstrip("bfsu").replace("x2", "").isdigit()]


@functools.cache
def operation(opcode: str) -> Operation:
    """What an opcode computes.

    Raises:
        NotImplementedError: it is none of those that a kernel of this library has needed.
    """
    base, *modifiers = opcode.split(".")
    kinds = _kinds(modifiers)
    kind = kinds[-1] if kinds else ""
    if base == "setp":
        compare = _compared(modifiers[0], _is_float(kind))
        join = _JOINED.get(modifiers[1]) if len(modifiers) > 1 else None
        if join is not None:
            return Operation((kind, kind, "pred"), "pred", lambda a, b, p: join(compare(a, b), p))
        return Operation((kind, kind), "pred", compare)
    if base == "selp":
        return Operation((kind, kind, "pred"), kind, _selected)
    if base == "cvt" and len(kinds) == 2:
        return _conversion(kinds[0], kinds[1], modifiers)
    if base in ("add", "sub", "fma") and len(kinds) == 2:  # f32 with the first operands narrower
        compute: Any = _fused("f32") if base == "fma" else _FLOAT[base]
        narrow = (kinds[1],) * (2 if base == "fma" else 1)
        return Operation((*narrow, "f32"), "f32", compute)
    if kind and _is_float(kind):
        return _of_floats(base, kind, modifiers)
    if kind:
        return _of_integers(base, kind, modifiers)
    raise NotImplementedError(f"opcode: {opcode}")


def _selected(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


def _conversion(target: str, source: str, modifiers: list[str]) -> Operation:
    def converted(a: Array) -> Array:
        return convert(a, source, target, modifiers)

    if target in ("f16x2", "bf16x2"):  # the first operand is the upper half

        def paired(upper: Array, lower: Array) -> Array:
            return np.stack(np.broadcast_arrays(lower, upper), -1)

        return Operation((source, source), target, paired)
    return Operation((source,), target, converted)


def _of_floats(base: str, kind: str, modifiers: list[str]) -> Operation:
    if base == "fma":
        compute: Any = _fused(kind.partition("x")[0])
        return Operation((kind,) * 3, kind, compute)
    if base in ("min", "max") and "NaN" in modifiers:
        compute = np.minimum if base == "min" else np.maximum
    else:
        compute = _FLOAT.get(base)
    if compute is None:
        raise NotImplementedError(f"opcode: {base} of {kind}")
    if "ftz" in modifiers and kind == "f32":
        plain, compute = compute, lambda *args: _flushed(plain(*map(_flushed, args)))
    return Operation((kind,) * (1 if base in _UNARY else 2), kind, compute)


def _flushed(a: Array) -> Array:
    """Without subnormal numbers."""
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)


def _of_integers(base: str, kind: str, modifiers: list[str]) -> Operation:
    bits = width(kind)
    if base in ("shl", "shr"):
        compute: Any = _shift(np.left_shift if base == "shl" else np.right_shift, bits)
        return Operation((kind, "u32"), kind, compute)
    if base == "bfe":
        return Operation((kind, "u32", "u32"), kind, _field(kind[0] == "s", bits))
    if base == "bfi" and bits == 32:
        return Operation((kind, kind, "u32", "u32"), kind, _inserted)
    if base == "prmt":
        return Operation(("b32",) * 3, "b32", _permuted)
    if base == "shf":
        return Operation(("b32",) * 3, "b32", _funnel(modifiers[0] == "l", modifiers[1] == "clamp"))
    if base == "popc":
        return Operation((kind,), "u32", _INTEGER[base])
    compute = _INTEGER.get(base)
    if compute is None:
        raise NotImplementedError(f"opcode: {base} of {kind}")
    if base in ("mul", "mad") and "wide" in modifiers:
        return _widened(compute, kind, bits, base == "mad")
    if base in ("mul", "mad") and "hi" in modifiers:
        if bits != 32 or base == "mad":
            raise NotImplementedError(f"opcode: {base}.hi of {kind}")
        both: Any = np.int64 if kind[0] == "s" else np.uint64
        return Operation(
            (kind, kind), kind, lambda a, b: (a.astype(both) * b.astype(both)) >> both(32)
        )
    count = 1 if base in _UNARY else 3 if base == "mad" else 2
    return Operation((kind,) * count, kind, compute)


def _widened(compute: Callable[..., Array], kind: str, bits: int, added: bool) -> Operation:
    """A product in twice the width, and what is ``added`` to it."""
    target = f"{kind[0]}{2 * bits}"
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 4}")

    def found(a: Array, b: Array, *c: Array) -> Array:
        return compute(a.astype(wide), b.astype(wide), *c)

    return Operation((kind, kind, target) if added else (kind, kind), target, found)
