"""Inspect many kernels, in a pool of new processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tritonnorm.tune.static import KernelReport, inspect_kernel, is_jit, resolve

__all__ = ["KernelSpec", "compile_each", "compile_many"]


@dataclass(frozen=True)
class KernelSpec:
    """What to compile. The arguments are those of :func:`inspect_kernel`."""

    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    target: Any = "sm_90"
    options: Mapping[str, Any] = field(default_factory=dict)
    disassemble: bool = True


def compile_many(specs: Sequence[KernelSpec], processes: int = 1) -> list[KernelReport]:
    """Inspect every spec, in order, in this process or in a pool of new ones.

    With ``processes > 1`` kernels and constexpr functions travel by import path: they must be
    attributes of an importable module. The pool also works from a process that interprets kernels.

    Raises:
        ValueError: for a kernel that cannot be imported by name; else as :func:`inspect_kernel`.
    """
    found: dict[int, KernelReport] = {}
    for i, report in compile_each(specs, processes):
        if isinstance(report, Exception):
            raise report
        found[i] = report
    return [found[i] for i in range(len(specs))]


def compile_each(
    specs: Sequence[KernelSpec], processes: int = 1
) -> Iterator[tuple[int, KernelReport | Exception]]:
    """The same, one by one as they are done: the index, and the report or what went wrong.

    Closing the iterator, or an interrupt, ends the processes.
    """
    if processes <= 1:
        for i, spec in enumerate(specs):
            yield i, _report(spec)
        return
    portable = [_portable_spec(spec) for spec in specs]
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, max(1, len(specs))), multiprocessing.get_context("spawn")
    )
    with pool:
        with _environment(TRITON_INTERPRET="0"):  # what a new process sees when it imports triton
            jobs = {pool.submit(_report, spec): i for i, spec in enumerate(portable)}
        try:
            for job in concurrent.futures.as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _report(spec: KernelSpec) -> KernelReport | Exception:
    try:
        return _inspect_spec(spec)
    except Exception as error:
        return error


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
        spec.disassemble,
    )


def _portable_spec(spec: KernelSpec) -> KernelSpec:
    kernel = spec.kernel if isinstance(spec.kernel, str) else _path_of(spec.kernel)
    constexprs = {name: _portable_value(value) for name, value in spec.constexprs.items()}
    return replace(spec, kernel=kernel, constexprs=constexprs)


def _portable_value(value: Any) -> Any:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_portable_value(v) for v in value)
    return _ByPath(_path_of(value)) if is_jit(value) else value


def _resolve_value(value: Any) -> Any:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_resolve_value(v) for v in value)
    return resolve(value.path) if isinstance(value, _ByPath) else value


def _path_of(kernel: Any) -> str:
    function = kernel.fn
    module, name = function.__module__, function.__name__
    if getattr(importlib.import_module(module), name, None) is not kernel:
        raise ValueError(
            f"kernel: expected an attribute of an importable module, "
            f"got {module}:{function.__qualname__}"
        )
    return f"{module}:{name}"


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
