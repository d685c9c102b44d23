"""Candidates that are worth timing, by their machine code: no GPU is needed.

A configuration that spills registers, or whose accesses are narrower than the tensors allow, loses
on every GPU of its architecture. The kernels of a candidate are found by going the operator's way
with arguments that have no data.
"""

from __future__ import annotations

import linecache
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tritonnorm.device import INTERPRETER, Device
from tritonnorm.kernels.base import Config, Launch, launches_to
from tritonnorm.kernels.folding import Batch
from tritonnorm.kernels.planes import in_rows, vector_of, whole_planes
from tritonnorm.problem import FoldProblem
from tritonnorm.tune.key import Shape
from tritonnorm.tune.pool import KernelSpec, compile_each
from tritonnorm.tune.search import Candidate
from tritonnorm.tune.static import KernelReport, target_of
from tritonnorm.tune.trials import trial_of

__all__ = ["TENSORS", "WIDE", "Pruned", "access_width", "faults", "prune", "specs", "widths"]

WIDE = 128  # bits
TENSORS = ("x", "y", "dy", "dx", "residual", "dresidual")
_ACCESS = re.compile(r"tl\.(load|store)\((\w+)_ptr\b")
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def access_width(problem: Any, config: Config, device: Device, algorithm: str = "") -> int:
    """Bits that an access can have: by what divides the contiguous axis, and a thread's share.

    What that axis is depends on the algorithm: those of batch norms may take the planes of
    several channels, and a program of "group_resident" has the channels of one group.
    """
    vector = problem.vector
    if algorithm == "group_resident":
        vector = problem.strip
    elif algorithm in ("resident", "persistent") and whole_planes(problem, config):
        problem, vector = problem.flat, vector_of(problem, config)
    elif algorithm == "affine":
        problem, vector = problem.flat, problem.flat.vector
    elif algorithm == "split":
        problem, _ = in_rows(problem)
        vector = problem.vector
    contiguous = config.block_c if problem.view.channels_last else config.block_p
    of_thread = max(1, config.tile // (config.num_warps * device.warp))
    return min(WIDE, min(vector, contiguous, of_thread) * problem.dtype.itemsize * 8)


def widths(report: KernelReport) -> dict[str, int]:
    """Tensor (and "mask") -> bits of its narrowest access; the source lines say which tensor."""
    found: dict[str, int] = {}
    for access in report.accesses:
        line = linecache.getline(access.file, access.line)
        for kind, name in _ACCESS.findall(line):
            if kind == access.kind and name in (*TENSORS, "mask"):
                found[name] = min(access.bits, found.get(name, access.bits))
    return found


def faults(
    problem: Shape, config: Config, device: Device, report: KernelReport, algorithm: str = ""
) -> list[str]:
    """Why a kernel is not worth timing, in words that many share; empty if it is."""
    found = ["spills registers"] if report.spills or report.stack else []
    if not isinstance(problem, FoldProblem):
        expected = access_width(problem, config, device, algorithm)
        narrow = [bits for name, bits in widths(report).items() if name in TENSORS]
        if min(narrow, default=expected) < expected:
            found.append("loses vector width")
    return found


def specs(problem: Shape, candidate: Candidate, target: str) -> list[KernelSpec]:
    """The kernels that a candidate launches, for the compiler."""
    found: list[KernelSpec] = []
    with launches_to(lambda launch, tensors: found.append(_spec(launch, tensors, target))):
        if isinstance(problem, FoldProblem):
            _rehearse_fold(problem, candidate[1])
        else:  # parameters and statistics in float32, as mixed precision has them
            trial = trial_of(problem, torch.device("meta"), INTERPRETER)
            trial.calls(candidate)[0]()
    return found


def _rehearse_fold(problem: FoldProblem, config: Config) -> None:
    def of(dtype: torch.dtype) -> Any:
        return torch.empty(0, dtype=dtype, device="meta")

    dtypes = (problem.dtype, problem.affine, problem.statistics)
    table, work = of(torch.int64), of(torch.int32)
    batch = Batch(table, work, (), problem.elements, 16 * problem.channels, dtypes, config)
    batch.launch(False)(table, work, of(problem.dtype))
    batch.launch(True)(table, work, table, of(problem.dtype), of(problem.affine))


def _spec(launch: Launch, tensors: Sequence[Any], target: str) -> KernelSpec:
    """What Triton would specialise a launch to: aligned pointers, multiples of 16, ones."""
    kernel, sizes, options = launch.parts(target_of(target).backend)
    names = list(kernel.arg_names)
    plain = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get(
        "do_not_specialize"
    )
    kept = {n: v for n, v in options.items() if n not in names}
    constants = {n: v for n, v in options.items() if n in names}
    signature: dict[str, Any] = {}
    divisible = []
    for name, value in zip(names, (*tensors, *sizes), strict=False):
        if value is None:
            signature[name] = None
        elif isinstance(value, float):
            signature[name] = "fp64"
        elif isinstance(value, int):
            special = name not in (plain or ())
            if special and value == 1:
                constants[name] = 1
                continue
            signature[name] = "i32" if value < 1 << 31 else "i64"
            if special and value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = f"*{_TYPES[value.dtype]}"
            divisible.append(name)
    return KernelSpec(kernel, signature, constants, tuple(divisible), target, kept, False)


@dataclass
class Pruned:
    """What is left of a problem's candidates.

    Attributes:
        kept: worth timing, in the order given.
        reasons: why others are not -> how many.
    """

    kept: list[Candidate] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


def prune(
    todo: Mapping[Any, tuple[Shape, Sequence[Candidate]]],
    device: Device,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[tuple[Any, Pruned]]:
    """Drop candidates by their machine code, one problem after the other as they are done.

    Kernels that several problems share are compiled once.

    Args:
        todo: name -> problem and candidates.
        device: what for; its ``arch`` is the target.
        processes: that compile at once.
        progress: called as ``progress(done, of)`` with numbers of kernels.
    """
    wanted = {
        name: {c: specs(problem, c, device.arch) for c in candidates}
        for name, (problem, candidates) in todo.items()
    }
    every = [spec for found in wanted.values() for each in found.values() for spec in each]
    distinct = {_same(spec): spec for spec in every}
    numbers = {same: i for i, same in enumerate(distinct)}
    reports: dict[int, KernelReport | Exception] = {}
    stream = compile_each(list(distinct.values()), processes)
    for name, (problem, candidates) in todo.items():
        needed = {numbers[_same(s)] for each in wanted[name].values() for s in each}
        while not needed <= set(reports):
            i, report = next(stream)
            reports[i] = report
            progress(len(reports), len(distinct))
        result = Pruned()
        for candidate in candidates:
            found: list[str] = []
            for spec in wanted[name][candidate]:
                report = reports[numbers[_same(spec)]]
                if isinstance(report, Exception):
                    found.append("does not compile")
                else:
                    found += faults(problem, candidate[1], device, report, candidate[0])
            if found:
                result.reasons[found[0]] += 1
            else:
                result.kept.append(candidate)
        yield name, result


def _same(spec: KernelSpec) -> str:
    kernel = f"{spec.kernel.fn.__module__}:{spec.kernel.fn.__name__}"
    constants = {n: getattr(v, "__name__", v) for n, v in spec.constexprs.items()}
    parts = (kernel, spec.signature, constants, spec.divisible, spec.target, spec.options)
    return repr([sorted(p.items()) if isinstance(p, dict) else p for p in parts])
