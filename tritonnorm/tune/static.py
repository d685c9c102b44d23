"""Compile kernels for GPUs that need not be present, and report what the machine code looks like.

:func:`inspect_kernel` answers, for one kernel, argument types and launch options: how many
registers, how much stack and shared memory, how many spills, and how wide each global load and
store is. NVIDIA figures come from the cubin and its disassembly, AMD figures from the assembly
text. No GPU and no driver is needed; triton's own wheels bring the tools.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tritonnorm.tune.machine_code import Access, amd_resources, nvidia_resources

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

__all__ = [
    "Access",
    "CompileError",
    "KernelReport",
    "KernelSpec",
    "compile_many",
    "inspect_compiled",
    "inspect_kernel",
]

WIDE = 128  # bits: the widest access that every supported GPU has


class CompileError(RuntimeError):
    """A kernel did not compile; the message names kernel, target and options."""


@dataclass(frozen=True)
class KernelReport:
    """The machine code of one compiled kernel.

    Attributes:
        kernel: its name.
        target: ``sm_90``, ``gfx942``, ...
        registers: 32-bit registers per thread.
        stack: bytes of stack (private memory) per thread.
        spills: machine instructions (NVIDIA) or vector registers (AMD) that go to local memory.
        shared: bytes of shared memory per program.
        loads: bits per global load -> how many such instructions.
        stores: bits per global store -> how many such instructions.
        accesses: the same by source line, as the compiler's text output has them.
    """

    kernel: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    accesses: tuple[Access, ...] = ()

    @property
    def widest(self) -> int:
        """Bits of the widest global access; 0 without any."""
        return max([*self.loads, *self.stores], default=0)

    @property
    def narrow(self) -> int:
        """Global load and store instructions of less than 128 bits."""
        return sum(
            n for table in (self.loads, self.stores) for bits, n in table.items() if bits < WIDE
        )


@dataclass(frozen=True)
class KernelSpec:
    """What to compile. The arguments are those of :func:`inspect_kernel`."""

    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    target: Any = "sm_90"
    options: Mapping[str, Any] = field(default_factory=dict)


def inspect_kernel(
    kernel: Any,
    signature: Mapping[str, Any],
    constexprs: Mapping[str, Any] | None = None,
    divisible: Sequence[str] = (),
    target: GPUTarget | str = "sm_90",
    options: Mapping[str, Any] | None = None,
) -> KernelReport:
    """Compile `kernel` for `target` and report on the machine code.

    Args:
        kernel: a ``@triton.jit`` function, or its import path ``"module:name"``.
        signature: parameter name -> triton type (``"*bf16"``, ``"i32"``, ``"fp32"``). A tuple of
            types stands for a tuple argument. None stands for an argument that is None.
            ``"constexpr"`` parameters may be left out when `constexprs` has them.
        constexprs: parameter name -> value: numbers, bools, None, dtypes, tuples, jit functions.
        divisible: names of pointers aligned to 16 bytes and of integers that are multiples of 16. A
            tuple argument's name means all of its elements.
        target: ``"sm_80"``, ``"sm_100"``, ``"gfx942"``, ... or a ``GPUTarget``.
        options: ``num_warps``, ``num_stages``, ``maxnreg``, ... ``enable_fp_fusion`` is on unless
            given.

    Raises:
        RuntimeError: in a process that interprets kernels (``TRITON_INTERPRET=1``).
        ValueError: for a name the kernel does not have, or lacks, and for an unknown target.
        CompileError: when the compiler refuses the kernel.
    """
    _require_compiler()
    import triton

    kernel = _resolve(kernel)
    chosen = _target(target)
    source = _source(kernel, signature, constexprs or {}, divisible)
    settings = {"enable_fp_fusion": True, **(options or {})}
    try:
        compiled = triton.compile(source, target=chosen, options=settings)
    except Exception as error:
        raise CompileError(
            f"kernel {kernel.__name__} for {_target_name(chosen)} with {settings} and "
            f"{dict(constexprs or {})}: {error}"
        ) from error
    return inspect_compiled(compiled)


def inspect_compiled(compiled: Any, disassemble: bool = True) -> KernelReport:
    """Report on the machine code of a ``triton.compiler.CompiledKernel``, for whatever target.

    Args:
        compiled: the kernel.
        disassemble: NVIDIA only. False is faster: loads and stores are then those of the PTX.
    """
    target, asm = compiled.metadata.target, compiled.asm
    cuda = target.backend == "cuda"
    figures = nvidia_resources(asm, disassemble) if cuda else amd_resources(asm)
    return KernelReport(
        kernel=compiled.src.fn.__name__,
        target=_target_name(target),
        shared=compiled.metadata.shared,
        **figures,
    )


def compile_many(specs: Sequence[KernelSpec], processes: int = 1) -> list[KernelReport]:
    """Inspect every spec, in order, in this process or in a pool of new ones.

    With ``processes > 1`` kernels and constexpr functions travel by import path: they must be
    attributes of an importable module. The pool also works from a process that interprets kernels.

    Raises:
        ValueError: for a kernel that cannot be imported by name; else as :func:`inspect_kernel`.
    """
    if processes <= 1:
        return [_inspect_spec(spec) for spec in specs]
    portable = [_portable_spec(spec) for spec in specs]
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, max(1, len(specs))), multiprocessing.get_context("spawn")
    )
    with pool:
        with _environment(TRITON_INTERPRET="0"):  # what a new process sees when it imports triton
            jobs = [pool.submit(_inspect_spec, spec) for spec in portable]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@dataclass(frozen=True)
class _ByPath:
    """A jit function on its way to another process."""

    path: str


def _inspect_spec(spec: KernelSpec) -> KernelReport:
    return inspect_kernel(
        spec.kernel,
        spec.signature,
        {name: _resolve_value(value) for name, value in spec.constexprs.items()},
        spec.divisible,
        spec.target,
        spec.options,
    )


def _portable_spec(spec: KernelSpec) -> KernelSpec:
    kernel = spec.kernel if isinstance(spec.kernel, str) else _path_of(spec.kernel)
    constexprs = {name: _portable_value(value) for name, value in spec.constexprs.items()}
    return replace(spec, kernel=kernel, constexprs=constexprs)


def _portable_value(value: Any) -> Any:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_portable_value(v) for v in value)
    return _ByPath(_path_of(value)) if _is_jit(value) else value


def _resolve_value(value: Any) -> Any:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_resolve_value(v) for v in value)
    return _resolve(value.path) if isinstance(value, _ByPath) else value


def _is_jit(value: Any) -> bool:
    return hasattr(value, "fn") and hasattr(value, "arg_names")


def _path_of(kernel: Any) -> str:
    function = kernel.fn
    module, name = function.__module__, function.__name__
    if getattr(importlib.import_module(module), name, None) is not kernel:
        raise ValueError(
            f"kernel: expected an attribute of an importable module, "
            f"got {module}:{function.__qualname__}"
        )
    return f"{module}:{name}"


def _resolve(kernel: Any) -> Any:
    if not isinstance(kernel, str):
        return kernel
    module, separator, name = kernel.partition(":")
    if not separator or not module or not name:
        raise ValueError(f"kernel: expected 'module:name', got {kernel!r}")
    found = getattr(importlib.import_module(module), name, None)
    if not _is_jit(found):
        raise ValueError(f"kernel: expected a jit function at {kernel!r}, got {found!r}")
    return found


def _require_compiler() -> None:
    import triton.language as tl
    from triton import knobs
    from triton.runtime.jit import JITFunction

    # tl.sum is a jit function too: it shows what the variable was when triton was imported.
    if knobs.runtime.interpret or not isinstance(tl.sum, JITFunction):
        raise RuntimeError(
            "TRITON_INTERPRET is on in this process, so kernels are interpreted and cannot be "
            "compiled; unset it before the first import of triton, or use compile_many with "
            "processes=2"
        )


def _target(target: Any) -> GPUTarget:
    from triton.backends.compiler import GPUTarget

    if not isinstance(target, str):
        return target
    if target.startswith("sm_") and target[3:].isdigit():
        return GPUTarget("cuda", int(target[3:]), 32)
    if target.startswith("gfx") and len(target) > 5:
        return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    raise ValueError(f"target: expected 'sm_<number>' or 'gfx<number>', got {target!r}")


def _target_name(target: GPUTarget) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def _source(
    kernel: Any,
    signature: Mapping[str, Any],
    constexprs: Mapping[str, Any],
    divisible: Sequence[str],
) -> Any:
    names = list(kernel.arg_names)
    for given in (*signature, *constexprs, *divisible):
        if given not in names:
            raise ValueError(
                f"{given}: expected a parameter of {kernel.__name__} ({names}), got none"
            )
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        if name in constexprs:
            types[name] = "constexpr"
            constants[(i,)] = constexprs[name]
        elif name in signature and signature[name] != "constexpr":
            types[name] = _argument(signature[name], (i,), name in divisible, constants, attributes)
        else:
            raise ValueError(f"{name}: expected a type or a constexpr value, got neither")
    return _source_class()(fn=kernel, signature=types, constexprs=constants, attrs=attributes)


def _argument(
    kind: Any,
    path: tuple[int, ...],
    divisible: bool,
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
) -> Any:
    """The compiler's form of one argument's type; notes what is constant and what is aligned."""
    if isinstance(kind, (tuple, list)):
        return tuple(
            _argument(k, (*path, i), divisible, constants, attributes) for i, k in enumerate(kind)
        )
    if kind is None:
        constants[path] = None
        return "constexpr"
    if divisible:
        attributes[path] = [["tt.divisibility", 16]]
    return kind


def _source_class() -> Any:
    from triton.compiler import ASTSource

    class Source(ASTSource):
        """ASTSource whose cache key also covers jit functions inside tuples."""

        def hash(self) -> str:
            nested = [key for value in self.constants.values() for key in _nested_keys(value)]
            return hashlib.sha256("-".join([super().hash(), *nested]).encode()).hexdigest()

    return Source


def _nested_keys(value: Any) -> list[str]:
    if isinstance(value, tuple):
        return [key for item in value for key in _nested_keys(item)]
    return [value.cache_key] if hasattr(value, "cache_key") else []


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old
