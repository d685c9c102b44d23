"""Make Triton's CPU interpreter behave like the hardware where this project depends on it.

Call :func:`install` once per process, before the first kernel runs. It changes the interpreter of
the running process only. What it mends:

* bf16: the stock interpreter truncates on the way down, flushes subnormals to zero, and does
  arithmetic on the raw 16-bit patterns. Afterwards every conversion rounds to nearest even and
  arithmetic is done in fp32 and rounded once, bit for bit as torch does on a CPU.
* ``tl.device_assert`` is active, and int32 arithmetic that overflows raises.
* ``range(n)`` with a run-time ``n`` works with every numpy (triton <= 3.6 fails with numpy >= 2.4).
* float arguments have the precision they have on a GPU: fp32, or what the parameter's annotation
  says (``eps: tl.float64``). The stock interpreter hands over the Python float.
* the language is patched once per launch, not again for every call of a device function, which
  makes a program with a few such calls several times faster.
* numpy warnings about overflow, division by zero and invalid values are silent, as on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import _normalize_ty

__all__ = ["bfloat16_to_float32", "float32_to_bfloat16", "install"]

_FLOAT_ANNOTATIONS = {
    "fp16": tl.float16,
    "float16": tl.float16,
    "bf16": tl.bfloat16,
    "bfloat16": tl.bfloat16,
    "fp64": tl.float64,
    "float64": tl.float64,
}


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 `values` to nearest even and return the bf16 bit patterns as uint16."""
    bits = np.atleast_1d(np.ascontiguousarray(values, np.float32)).view(np.uint32)
    bits = bits.reshape(np.shape(values))
    low_bit = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + (low_bit + np.uint32(0x7FFF))) >> np.uint32(16)
    # The carry could turn a NaN into an infinity, so a NaN keeps its payload and becomes quiet.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bf16 bit patterns given as uint16. Exact."""
    wide = np.asarray(bits).astype(np.uint32) << np.uint32(16)
    return np.atleast_1d(wide).view(np.float32).reshape(np.shape(bits))


def install() -> None:
    """Patch the interpreter of this process. Calling it again does nothing.

    Raises:
        RuntimeError: if triton was imported without ``TRITON_INTERPRET=1``.
    """
    if getattr(stock, "_tritonnorm_installed", False):
        return
    if not _interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET: expected 1 before the first import of triton, got it unset"
        )
    _exact_bfloat16()
    _checked_builder()
    _patch_language_once()
    _typed_scalars()
    _silent_numpy()
    stock._tritonnorm_installed = True


def _interpreting() -> bool:
    # tl.sum is itself a jit function: it shows what the variable was when triton was imported.
    return isinstance(tl.sum, stock.InterpretedFunction)


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, stock.TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(value: Any) -> Any:
    if not _is_bfloat16(value):
        return value
    return stock.TensorHandle(bfloat16_to_float32(value.data), tl.float32)


def _narrow(handle: Any) -> Any:
    if handle.data.dtype != np.float32:  # a comparison: the result is a mask
        return handle
    return stock.TensorHandle(float32_to_bfloat16(handle.data), tl.bfloat16)


def _exact_bfloat16() -> None:
    builder = stock.InterpreterBuilder

    cast = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if src.dtype.scalar == target:
            return src
        src = _widen(src)
        if target == tl.bfloat16:
            data = float32_to_bfloat16(src.data.astype(np.float32))
            return stock.TensorHandle(data, tl.bfloat16)
        return src if src.dtype.scalar == target else cast(self, src, dst_type)

    builder.cast_impl = cast_impl

    round_with = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        toward_zero = rounding_mode == stock._ir.ROUNDING_MODE.RTZ
        pair = {src.dtype.scalar, dst_type.scalar}
        if tl.bfloat16 in pair and not toward_zero and not any(t.is_fp8() for t in pair):
            return self.cast_impl(src, dst_type)
        return round_with(self, src, dst_type, rounding_mode)

    builder.create_fp_to_fp = create_fp_to_fp

    def in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any) -> Any:
            if not any(_is_bfloat16(a) for a in args):
                return method(self, *args)
            return _narrow(method(self, *[_widen(a) for a in args]))

        return wrapped

    for name in ("unary_op", "binary_op", "ternary_op", "create_fma"):
        setattr(builder, name, in_float32(getattr(builder, name)))

    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), d, *rest)

    builder.create_dot = create_dot

    def get_bf16(self: Any, value: float) -> Any:
        return stock.TensorHandle(float32_to_bfloat16(np.array([value], np.float32)), tl.bfloat16)

    builder.get_bf16 = get_bf16

    reduce_or_scan = stock.ReduceScanOpInterface.apply

    def apply(self: Any, value: Any) -> Any:
        group = value if isinstance(value, tuple) else (value,)
        if not any(_is_bfloat16(t.handle) for t in group):
            return reduce_or_scan(self, value)
        wide = tuple(
            self.to_tensor(bfloat16_to_float32(t.handle.data), tl.float32)
            if _is_bfloat16(t.handle)
            else t
            for t in group
        )
        results = tuple(reduce_or_scan(self, wide))
        narrow = tuple(
            tl.tensor(_narrow(r.handle), _like(r.type, tl.bfloat16))
            if i < len(group) and _is_bfloat16(group[i].handle)
            else r
            for i, r in enumerate(results)
        )
        return narrow if isinstance(value, tuple) else narrow[0]

    stock.ReduceScanOpInterface.apply = apply


def _like(kind: Any, scalar: Any) -> Any:
    return tl.block_type(scalar, kind.shape) if kind.is_block() else scalar


def _checked_builder() -> None:
    stock.interpreter_builder.options = stock.InterpreterOptions(debug=True)


class _NoScope:
    """Stands for the patches of a nested call that the enclosing launch has already made."""

    def restore(self) -> None:
        pass


class _LaunchScope:
    """Undoes every patch made since a launch began, the latest first."""

    def __init__(self, patched: set[int], scopes: list[Any]) -> None:
        self._patched = patched
        self._scopes = scopes

    def restore(self) -> None:
        while self._scopes:
            scope = self._scopes.pop()
            if scope is not None:  # triton 3.4 leaves its patches in place
                scope.restore()
        self._patched.clear()


def _patch_language_once() -> None:
    tensor_patch = stock._patch_lang_tensor

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        tensor_patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.ravel(self.handle.data)[0])

    stock._patch_lang_tensor = patch_tensor

    patch = stock._patch_lang
    patched: set[int] = set()
    scopes: list[Any] = []

    @functools.cache
    def language_modules(fn: Any) -> frozenset[int]:
        return frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)

    def patch_lang(fn: Any) -> Any:
        modules = language_modules(fn)
        if modules and modules <= patched:
            return _NoScope()
        outermost = not patched
        scopes.append(patch(fn))
        patched.update(modules)
        return _LaunchScope(patched, scopes) if outermost else _NoScope()

    stock._patch_lang = patch_lang


def _typed_scalars() -> None:
    to_host = stock.GridExecutor._init_args_hst

    def init_args(
        self: Any, args_dev: Any, kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = to_host(self, args_dev, kwargs)
        typed = {
            name: _typed(value, _float_type(self.fn, name))
            for name, value in [*zip(self.arg_names, args, strict=False), *kwargs.items()]
            if name not in self.constexprs
        }
        args = [typed.get(name, a) for name, a in zip(self.arg_names, args, strict=False)]
        return args, {name: typed.get(name, value) for name, value in kwargs.items()}

    stock.GridExecutor._init_args_hst = init_args


def _float_type(fn: Any, name: str) -> Any:
    annotation = fn.__annotations__.get(name)
    if annotation is None:
        return tl.float32
    return _FLOAT_ANNOTATIONS.get(_normalize_ty(annotation), tl.float32)


def _typed(value: Any, float_type: Any) -> Any:
    """`value` as the scalar a GPU kernel would receive; tuples element by element."""
    if isinstance(value, bool):
        return tl.tensor(stock.TensorHandle(np.array([value]), tl.int1), tl.int1)
    if isinstance(value, float):
        if float_type == tl.bfloat16:
            data = float32_to_bfloat16(np.array([value], np.float32))
        else:
            with np.errstate(over="ignore"):
                data = np.array([value]).astype(stock._get_np_dtype(float_type))
        return tl.tensor(stock.TensorHandle(data, float_type), float_type)
    if isinstance(value, tuple):
        items = [_typed(v, float_type) for v in value]
        return value._make(items) if hasattr(value, "_make") else tuple(items)
    return value


def _silent_numpy() -> None:
    call = stock.GridExecutor.__call__

    def silent_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return call(self, *args, **kwargs)

    stock.GridExecutor.__call__ = silent_call
