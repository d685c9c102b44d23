"""The compile audit: every algorithm and configuration, compiled for GPUs that need not be there.

The calls go through the public API and the launch path of the library, under a driver that compiles
and records but does not run. So what is inspected is what a GPU would get, argument by argument.
Needs a process without Triton's interpreter; `audit_in_children` starts such processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from bench.audit import limits
from bench.audit.limits import ISSUED
from bench.call import DIRECTIONS, Call, Direction
from bench.lab.kept import kept_kernels
from bench.norm_call import NormCall
from bench.processes import Job, Progress, run_jobs, silent
from tritonnorm.device import KNOWN, simulated
from tritonnorm.kernels import BY_NAME
from tritonnorm.kernels.base import Config
from tritonnorm.plan import force_plan, plan
from tritonnorm.problem import Problem
from tritonnorm.tune.prune import access_width, widths
from tritonnorm.tune.static import KernelReport

if TYPE_CHECKING:
    from bench.lab.fake_driver import FakeDriver, LaunchRecord

__all__ = ["GPUS", "CompileCase", "CompileRow", "audit", "audit_in_children", "cases"]

#: Target -> the GPU whose description plans for it.
GPUS = {"sm_80": "a100", "sm_90": "h200", "sm_100": "b200", "gfx942": "mi300x"}


@dataclass(frozen=True)
class CompileCase:
    """A call to compile by one algorithm for one target.

    Attributes:
        call, algorithm, target: what for what.
        every_config: all configurations of the algorithm, else the formula's.
        disassemble: take the widths of loads and stores from machine code, not from PTX: a second a
            kernel.
        directions: those to report; the algorithm must support them.
    """

    call: Call | NormCall
    algorithm: str
    target: str
    every_config: bool = True
    disassemble: bool = False
    directions: tuple[Direction, ...] = DIRECTIONS


@dataclass(frozen=True)
class CompileRow:
    """One kernel of one configuration.

    Attributes:
        case, direction, config: what it was compiled for.
        launches: kernels that the whole direction launches.
        report: registers, stack, spills, access widths.
        widths: activation tensor -> narrowest of its loads and stores, in bits.
        mask_width: the same of the bit mask, 0 without one.
        expected: the width that alignment and the tile allow, at most 128 bits.
        warps: of a program.
        programs: on one multiprocessor at once, 0 where that is not known.
    """

    case: CompileCase
    direction: Direction
    config: Config
    launches: int
    report: KernelReport
    widths: dict[str, int]
    mask_width: int
    expected: int
    warps: int = 0
    programs: int = 0

    @property
    def issue(self) -> float:
        """Its instructions' share of the time that its bytes take: `limits.issue`."""
        return limits.issue(self.report, KNOWN[GPUS[self.case.target]])

    @property
    def wait(self) -> float:
        """The same of waiting for memory, if it touches activations: `limits.wait`."""
        device = KNOWN[GPUS[self.case.target]]
        threads = self.programs * self.warps * device.warp if self.widths else 0
        return limits.wait(self.report, device, threads)

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, in words; empty if nothing is."""
        r = self.report
        found = [f"{r.spills} spills"] if r.spills else []
        if r.stack:
            found.append(f"{r.stack} bytes of stack")
        problem = self.case.call.problem(self.direction)
        if self.issue > (limits.MOST_ISSUE_ALONE if problem.vector == 1 else limits.MOST_ISSUE):
            found.append(f"issues for {self.issue:.2f} of the time of its bytes")
        # A tuner may find that another configuration waits too long; the formula's must not.
        if not self.case.every_config and problem.bytes >= limits.LARGE:
            loops = any(each.inner for each in r.loops)
            if self.wait > (limits.MOST_WAIT if loops else limits.MOST_WAIT_ONCE):
                found.append(f"waits for {self.wait:.2f} of the time of its bytes")
        for name, bits in self.widths.items():
            if bits < self.expected:
                found.append(f"{name} is accessed in {bits} of {self.expected} bits")
        return found

    def __str__(self) -> str:
        c = self.case.call
        return (
            f"{self.report.target} {self.case.algorithm} {self.report.kernel}: {self.direction} of "
            f"{c.op} {c.size} {c.layout} {c.type} {c.mode}, {self.config}"
        )


def cases(quick: bool = False) -> list[CompileCase]:
    """What the audit compiles.

    First every algorithm in every configuration for every target, with an epilogue that keeps many
    values alive. Then, in the formula's configuration, other epilogues, dtypes and sizes; these
    take turns with the targets, two each, and the sizes are disassembled, as is all of it for the
    H200, whose instructions are counted. ``quick``: a layer of ResNet-50 for every algorithm.
    """
    large, small = (32, 256, 56, 56), (8, 512, 7, 7)
    fused: dict[str, Any] = {"activation": "relu", "residual": True}
    if quick:
        few = [
            (Call(large, True, **fused), "split"),
            (Call(large, True, **fused), "persistent"),
            (Call((32, 256, 14, 14), False, **fused), "resident"),
            (Call(large, True, activation="relu", training=False), "affine"),
        ]
        return [CompileCase(*each, target, every_config=False) for each in few for target in GPUS]
    every = [(Call(large, channels_last, **fused), "split") for channels_last in (True, False)] + [
        (Call(large, True, activation="relu", training=False), "affine"),
        (Call(large, False, activation="relu", training=False), "affine"),
        (Call(small, True, **fused), "resident"),
        (Call((32, 256, 14, 14), False, **fused), "resident"),
    ]
    options: tuple[dict[str, Any], ...] = (
        {"dtype": torch.float32, "activation": "mish", "residual": True},
        {"dtype": torch.float16, "activation": "gelu"},
        {"dtype": torch.float64, "activation": "relu", "residual": True},
        {"dtype": torch.float32},
        {"activation": "prelu", "residual": True},
    )
    other = []
    for i, kind in enumerate(options):
        one, two = bool(i % 2), not i % 2
        other += [
            (Call(large, one, **kind), "split"),
            (Call(large, two, training=False, **kind), "affine"),
            (Call(small, one, **kind), "resident"),
            (Call(large, one, **kind), "persistent"),
        ]
    other += [
        (Call((8, 64, 28, 28), False, **fused), "resident"),
        (Call((64, 64, 14, 14), False, **fused), "split"),  # four elements divide a row
        (Call((16, 64, 7, 7), False, **fused), "split"),  # one
        (Call((256, 2048, 7, 7), False, **fused), "persistent"),  # flat
        (Call((64, 64, 7, 7), False, activation="silu", training=False), "affine"),  # flat
        (Call((32, 2048, 7, 7), False, activation="relu"), "resident"),  # flat: 128 bits
        (Call((128, 2048, 7, 7), False, activation="relu"), "resident"),  # flat: 64 and 32
        (Call((256, 512, 14, 14), False, torch.float16, "gelu", True), "persistent"),
        (Call((64, 1024, 14, 14), False, activation="silu"), "resident"),  # flat
        (Call((32, 36, 28, 28), True, **fused), "split"),
        (Call((256, 1024), False, **fused), "resident"),  # (N, C) input
    ]
    pairs = (("sm_80", "gfx942"), ("sm_90", "sm_100"))
    meeting = [
        CompileCase(Call(large, target in ("sm_90", "gfx942"), **fused), "persistent", target)
        for target in GPUS
    ]
    # As many values as a program may keep, and as many as it may work on.
    most: list[tuple[Call, str, str, Direction]] = [
        (Call((56, 240, 14, 14), False, activation="silu"), "resident", "sm_90", "backward"),
        (Call((64, 240, 14, 14), False, activation="silu"), "resident", "sm_90", "backward"),
        (Call((64, 240, 14, 14), False, activation="silu"), "resident", "sm_100", "backward"),
        (Call((2, 256, 32, 32, 28), False, activation="relu"), "resident", "gfx942", "forward"),
        (Call((64, 2048, 7, 7), False, **fused), "resident", "sm_90", "forward"),
        (Call((64, 96, 56, 56), False, activation="silu"), "persistent", "sm_100", "backward"),
        (Call((64, 144, 56, 56), True, activation="silu"), "persistent", "sm_100", "backward"),
        (Call((64, 240, 28, 28), True, activation="silu"), "persistent", "sm_90", "backward"),
    ]
    full = [CompileCase(c, name, target, False, directions=(d,)) for c, name, target, d in most]
    every_one = [CompileCase(*each, target) for each in every for target in GPUS]
    return [
        *every_one,
        *meeting,
        *full,
        *(
            CompileCase(
                *(*each, target),
                every_config=False,
                disassemble=target in ISSUED or each[0].op == "BN+add+relu",
            )
            for i, each in enumerate(other)
            for target in pairs[i % 2]
        ),
    ]


def audit(case: CompileCase) -> list[CompileRow]:
    """Compile a case and inspect its kernels; one that several configurations share has one row.

    Raises:
        RuntimeError: in a process that interprets kernels, or if no kernel touches a tensor it must
            touch.
    """
    from triton.backends.compiler import GPUTarget

    from bench.lab.fake_driver import fake_driver

    device = KNOWN[GPUS[case.target]]
    amd = case.target.startswith("gfx")
    target = (
        GPUTarget("hip", case.target, 64) if amd else GPUTarget("cuda", int(case.target[3:]), 32)
    )
    tensors = case.call.tensors()
    rows: list[CompileRow] = []
    seen: set[int] = set()
    y: torch.Tensor | None = None
    with simulated(device), fake_driver(target, multiprocessors=device.sms) as log:
        if case.directions == ("backward",):
            y = tensors.forward()
        for direction in case.directions:
            for config in _configs(case, direction):
                log.launches.clear()
                with force_plan(case.algorithm, config):
                    chosen = plan(case.call.problem(direction), device)
                    if (chosen.algorithm, chosen.config) != (case.algorithm, config):
                        raise RuntimeError(f"{case}: {chosen} was chosen instead")
                    if direction == "forward":
                        y = tensors.forward()
                    else:
                        assert y is not None
                        tensors.backward(y)
                fresh = {launch.variant: launch for launch in log.launches}
                for variant, launch in fresh.items():
                    if variant not in seen:
                        rows.append(_row(case, direction, config, log, launch))
                seen |= set(fresh)
            _check_found(case, direction, [row for row in rows if row.direction == direction])
    return rows


def _check_found(case: CompileCase, direction: Direction, rows: Sequence[CompileRow]) -> None:
    """Refuse to call a kernel fine because its accesses were not recognised."""
    problem = case.call.problem(direction)
    mask = isinstance(problem, Problem) and problem.mask
    if direction == "forward":
        wanted = {"x": True, "y": True, "residual": problem.reads_residual, "mask": mask}
    else:
        reads_input = not isinstance(problem, Problem) or problem.reads_input
        wanted = {"dy": True, "x": reads_input, "residual": problem.reads_residual}
        wanted |= {"dx": problem.needs_dx, "dresidual": problem.needs_dresidual, "mask": mask}
    found = {name for row in rows for name in row.widths}
    found |= {"mask" for row in rows if row.mask_width}
    if missing := [name for name, needed in wanted.items() if needed and name not in found]:
        raise RuntimeError(f"{case}: {direction}: no access found of {', '.join(missing)}")


def _configs(case: CompileCase, direction: Direction) -> list[Config]:
    """Configurations that compile to different code."""
    problem, device = case.call.problem(direction), KNOWN[GPUS[case.target]]
    algorithm = BY_NAME[case.algorithm]
    if (reason := algorithm.supports(problem, device)) is not None:
        raise ValueError(f"case: {case.algorithm} cannot run {case.call} {direction}: {reason}")
    if not case.every_config:
        return [algorithm.heuristic(problem, device)]
    found: dict[Config, Config] = {}
    for config in algorithm.configs(problem, device):
        found.setdefault(same_code(config), config)
    return list(found.values())


def same_code(config: Config) -> Config:
    """What of a configuration matters to the code: not how many splits and blocks at once."""
    return replace(config, splits=1, at_once=min(config.at_once, 1))


def _row(
    case: CompileCase, direction: Direction, config: Config, log: FakeDriver, launch: LaunchRecord
) -> CompileRow:
    report = log.report(launch, disassemble=case.disassemble)
    found = widths(report)
    mask = found.pop("mask", 0)
    problem, device = case.call.problem(direction), KNOWN[GPUS[case.target]]
    expected = access_width(problem, config, device, case.algorithm)
    resident = limits.programs(report, device, launch.num_warps, math.prod(launch.grid))
    return CompileRow(
        *(case, direction, config, len(log.launches), report, found, mask, expected),
        *(launch.num_warps, resident),
    )


def audit_all(progress: Progress, todo: Sequence[CompileCase]) -> list[list[CompileRow]]:
    """`audit` of each case, in order; in a process of its own, which keeps kernels apart."""
    os.environ["TRITON_CACHE_DIR"] = kept_kernels()
    rows = []
    for i, case in enumerate(todo):
        progress(i, len(todo), f"{case.target} {case.algorithm} {case.call.op} {case.call.layout}")
        rows.append(audit(case))
    progress(len(todo), len(todo))
    return rows


def audit_in_children(
    todo: Sequence[CompileCase], processes: int = 2, progress: Progress = silent
) -> list[CompileRow]:
    """`audit` of each case in new processes; works from a process that interprets kernels, too.

    Raises:
        WorkFailed: a kernel did not compile, with the name of the case.
    """
    jobs = compile_jobs(todo, processes)
    done = dict.fromkeys((job.name for job in jobs), 0.0)

    def collect(name: str, finished: float, of: float, what: str) -> None:
        done[name] = finished
        progress(sum(done.values()), len(todo), what)

    return in_order(run_jobs(jobs, collect))


def compile_jobs(todo: Sequence[CompileCase], processes: int) -> list[Job]:
    """The cases dealt out to that many processes; `in_order` puts their results together."""
    work: Callable[..., Any] = audit_all
    shares = [list(todo[i::processes]) for i in range(processes)]
    return [Job(f"compile {i}", work, (share,), threads=1) for i, share in enumerate(shares)]


def in_order(shares: Sequence[list[list[CompileRow]]]) -> list[CompileRow]:
    """The rows of `compile_jobs` in the order of the cases."""
    dealt = zip_longest(*shares, fillvalue=[])
    return [row for round_ in dealt for rows in round_ for row in rows]
