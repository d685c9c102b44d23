"""PTX types as numpy arrays, and the way from one to another.

A register is an array of unsigned integers of its width, [programs, threads]; an axis on which all
agree may have length 1. bfloat16, which numpy has not, and float16 are computed on in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "bits_of", "convert", "immediate", "packed", "typed", "unsigned", "width"]

Array = NDArray[Any]

_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_CANONICAL = {np.dtype(np.uint16): 0x7FFF, np.dtype(np.uint32): 0x7FFFFFFF}


def width(kind: str) -> int:
    """Bits of a type; a predicate has 1."""
    if kind == "pred":
        return 1
    number, _, lanes = kind.lstrip("busf").partition("x")
    return int(number) * int(lanes or 1)


def unsigned(bits: int) -> np.dtype[Any]:
    """The numpy type of a register."""
    return np.dtype(np.bool_) if bits == 1 else np.dtype(f"u{bits // 8}")


def typed(register: Array, kind: str) -> Array:
    """The values that a register holds; of a wider one, the low bits. Lanes are a last axis."""
    if kind == "pred":
        return register
    single, _, lanes = kind.partition("x")
    if lanes:
        whole = np.ascontiguousarray(register.astype(unsigned(width(kind)), copy=False))
        return typed(whole[..., None].view(unsigned(width(single))), single)
    raw = register.astype(unsigned(width(kind)), copy=False)
    if kind == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    if kind in _FLOATS:
        return raw.view(_FLOATS[kind])
    return raw.view(f"i{raw.itemsize}") if kind[0] == "s" else raw


def bits_of(values: Array, kind: str) -> Array:
    """The register that holds values of a type; what does not fit in an integer wraps."""
    if kind == "pred":
        return values.astype(np.bool_, copy=False)
    single, _, lanes = kind.partition("x")
    if lanes:
        parts = np.ascontiguousarray(bits_of(values, single))
        return parts.view(unsigned(width(kind)))[..., 0]
    if kind == "bf16":
        return _rounded_to_bf16(values.astype(np.float32, copy=False))
    if kind in _FLOATS:
        raw = values.astype(_FLOATS[kind], copy=False).view(unsigned(width(kind)))
        if kind != "f64":
            raw = np.where(np.isnan(values), _CANONICAL[raw.dtype], raw).astype(raw.dtype)
        return raw
    return values.astype(unsigned(width(kind)), copy=False)


def _rounded_to_bf16(values: Array) -> Array:
    raw = values.view(np.uint32)
    rounded = (raw + (np.uint32(0x7FFF) + ((raw >> 16) & np.uint32(1)))) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def packed(parts: list[Array], bits: int) -> Array:
    """One register of several, the first in the low bits."""
    each, kind = bits // len(parts), unsigned(bits)
    found = parts[0].astype(kind)
    for i, part in enumerate(parts[1:], 1):
        found = found | (part.astype(kind) << kind.type(i * each))
    return found


def immediate(text: str, kind: str) -> Array:
    """A literal as a register of a type."""
    if text[:2] in ("0f", "0F"):
        raw, size = int(text[2:], 16), 32
    elif text[:2] in ("0d", "0D"):
        raw, size = int(text[2:], 16), 64
    else:
        raw, size = int(text.rstrip("U"), 0), width(kind)
    if kind == "pred":
        return np.array([[bool(raw)]])
    register = np.array([[raw % (1 << size)]], unsigned(size))
    if kind in _FLOATS and width(kind) != size:
        return bits_of(typed(register, f"f{size}"), kind)
    return register


_ROUNDED: dict[str, Any] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(values: Array, source: str, target: str, modifiers: list[str]) -> Array:
    """Values of one type as those of another: ``cvt``."""
    if "f" not in target:
        bits = width(target)
        low, high = (
            (-(1 << bits - 1), (1 << bits - 1) - 1) if target[0] == "s" else (0, (1 << bits) - 1)
        )
        if "f" not in source:
            return np.clip(values, low, high) if "sat" in modifiers else values
        whole = next((_ROUNDED[m] for m in modifiers if m in _ROUNDED), np.trunc)(values)
        inside = np.where(np.isnan(whole), 0.0, whole)
        wide = np.clip(inside, float(low), float(high))
        kind = "i8" if target[0] == "s" else "u8"
        return np.where(inside >= float(high), high, wide.astype(kind)).astype(kind)
    whole = next((_ROUNDED[m] for m in modifiers if m in _ROUNDED), None)
    if whole is not None:
        values = whole(values)
    if "sat" in modifiers:
        values = np.clip(np.where(np.isnan(values), 0.0, values), 0.0, 1.0)
    if "relu" in modifiers:
        values = np.fmax(values, 0.0)
    if target in ("f16", "bf16") and values.dtype != np.float32:
        # float64 in one rounding: numpy has it for float16; bfloat16 goes through float32.
        return values.astype(np.float16).astype(np.float32) if target == "f16" else values
    return values
