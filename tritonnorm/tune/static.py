"""Compile kernels for GPUs that need not be present, and report what the machine code looks like.

:func:`inspect_kernel` answers, for one kernel, argument types and launch options: how many
registers, how much stack and shared memory, how many spills, and how wide each global load and
store is. NVIDIA figures come from the cubin and its disassembly, AMD figures from the assembly
text. No GPU and no driver is needed; triton's own wheels bring the tools.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritonnorm.tune.loops import Loop
from tritonnorm.tune.machine_code import Access, amd_resources, nvidia_resources

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

__all__ = [
    "Access",
    "CompileError",
    "KernelReport",
    "inspect_compiled",
    "inspect_kernel",
    "is_jit",
    "resolve",
    "target_of",
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
        loops: what moves the data, where an NVIDIA kernel was disassembled.
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
    loops: tuple[Loop, ...] = ()

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


def inspect_kernel(
    kernel: Any,
    signature: Mapping[str, Any],
    constexprs: Mapping[str, Any] | None = None,
    divisible: Sequence[str] = (),
    target: GPUTarget | str = "sm_90",
    options: Mapping[str, Any] | None = None,
    disassemble: bool = True,
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
        disassemble: as for :func:`inspect_compiled`.

    Raises:
        RuntimeError: in a process that interprets kernels (``TRITON_INTERPRET=1``).
        ValueError: for a name the kernel does not have, or lacks, and for an unknown target.
        CompileError: when the compiler refuses the kernel.
    """
    _require_compiler()
    import triton

    kernel = resolve(kernel)
    chosen = target_of(target)
    source = _source(kernel, signature, constexprs or {}, divisible)
    settings = {"enable_fp_fusion": True, **(options or {})}
    try:
        compiled = triton.compile(source, target=chosen, options=settings)
    except Exception as error:
        raise CompileError(
            f"kernel {kernel.__name__} for {_target_name(chosen)} with {settings} and "
            f"{dict(constexprs or {})}: {error}"
        ) from error
    return inspect_compiled(compiled, disassemble)


def inspect_compiled(compiled: Any, disassemble: bool = True) -> KernelReport:
    """Report on the machine code of a ``triton.compiler.CompiledKernel``, for whatever target.

    Args:
        compiled: the kernel.
        disassemble: NVIDIA only. False is faster: loads and stores are then those of the PTX, and
            there are no loops.
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


def is_jit(value: Any) -> bool:
    """Whether a value is a function that triton compiles, or interprets."""
    return hasattr(value, "fn") and hasattr(value, "arg_names")


def resolve(kernel: Any) -> Any:
    """A jit function, given itself or by its import path."""
    if not isinstance(kernel, str):
        return kernel
    module, separator, name = kernel.partition(":")
    if not separator or not module or not name:
        raise ValueError(f"kernel: expected 'module:name', got {kernel!r}")
    found = getattr(importlib.import_module(module), name, None)
    if not is_jit(found):
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


def target_of(target: Any) -> GPUTarget:
    """A target, given itself or by name; `ValueError` for a name that is none."""
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
