"""DRAM bytes of whole calls as the GPU counts them (NVIDIA's ncu), against the fewest bytes.

A child process under ncu runs one call per regime and direction; before each, a large read empties
the last-level cache of everything that is not clean. The launch of a marker kernel separates them.
What a call has written may still lie in the cache when it ends: DRAM writes can be fewer than the
call wrote, by up to the size of that cache. So the reads are what tells.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.call import DIRECTIONS, Call, Direction
from bench.record.rows import CounterRow
from tritonnorm.device import Device
from tritonnorm.plan import plan
from tritonnorm.problem import minimum_bytes

__all__ = ["MARKER", "REGIMES", "Kernel", "command", "kernels_in", "measure", "rows_of"]

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
MARKER = "spin_kernel"  # what torch.cuda._sleep launches

_BF16 = Call((), True, torch.bfloat16, "relu", residual=True)

#: Regime -> a call in it: each is computed in another way.
REGIMES: dict[str, Call] = {
    "launch-bound": replace(_BF16, shape=(32, 512, 7, 7), channels_last=False, residual=False),
    "a channel in a program": replace(_BF16, shape=(32, 256, 28, 28), channels_last=False),
    "data on chip": replace(_BF16, shape=(64, 256, 14, 14)),
    "a channel group in L2": replace(_BF16, shape=(256, 64, 112, 112), channels_last=False),
    "a strip in L2": replace(_BF16, shape=(256, 256, 56, 56)),
    "larger than L2": replace(_BF16, shape=(256, 64, 112, 112), dtype=torch.float32),
    "few channels": replace(_BF16, shape=(16, 3, 224, 224), channels_last=False, residual=False),
    "tiny planes": replace(_BF16, shape=(256, 2048, 7, 7), channels_last=False),
    "inference": replace(_BF16, shape=(256, 64, 112, 112), training=False),
}


@dataclass(frozen=True)
class Kernel:
    """A launch that ncu saw, and its DRAM traffic in bytes."""

    name: str
    read: int
    written: int


def command(python: str, log: Path, regimes: Sequence[str]) -> list[str]:
    """The command line: one pass over the launches, no flush, clocks as they are."""
    how = ("--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off")
    as_is = ("--cache-control", "none", "--clock-control", "none")
    what = ("--metrics", f"{READ},{WRITTEN}", "--log-file", str(log))
    return ["ncu", *how, *as_is, *what, python, "-m", "bench.counters", *regimes]


def measure(regimes: Sequence[str] = tuple(REGIMES), limit: float = 300.0) -> list[CounterRow]:
    """Count the DRAM bytes of each regime, forward and backward.

    Args:
        regimes: keys of `REGIMES`.
        limit: seconds after which it is given up.

    Raises:
        ValueError: there is no such regime.
        RuntimeError: no GPU, no ncu, or it failed; the message ends with what it said.
    """
    for name in regimes:
        if name not in REGIMES:
            raise ValueError(f"regime: expected one of {', '.join(REGIMES)}; got {name!r}")
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU")
    if shutil.which("ncu") is None:
        raise RuntimeError("ncu is not on the PATH; it comes with NVIDIA's Nsight Compute")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        done = subprocess.run(
            command(sys.executable, log, regimes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
        text = log.read_text(encoding="utf-8") if log.exists() else ""
    if done.returncode:
        said = " ".join((done.stdout + text).split())[-300:]
        raise RuntimeError(f"ncu: exit code {done.returncode}: {said}")
    return list(rows_of(list(kernels_in(text)), regimes, Device.of(torch.device("cuda"))))


def kernels_in(text: str) -> Iterator[Kernel]:
    """The launches in a log of ncu, in order: CSV with a line of units, after lines of its own."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = csv.DictReader(lines)
    for row in table:
        if not row["ID"]:  # the units
            units = {row[READ], row[WRITTEN]}
            if units != {"byte"}:
                raise RuntimeError(f"ncu: expected bytes, got {', '.join(sorted(units))}")
            continue
        read, written = (int(float(row[name].replace(",", ""))) for name in (READ, WRITTEN))
        yield Kernel(row["Kernel Name"], read, written)


def rows_of(
    kernels: Sequence[Kernel], regimes: Sequence[str], device: Device
) -> Iterator[CounterRow]:
    """A row per regime and direction, from all launches with the markers between them.

    Raises:
        RuntimeError: another number of markers, or nothing between two of them.
    """
    calls: list[list[Kernel]] = []
    for kernel in kernels:
        if MARKER in kernel.name:
            calls.append([])
        elif calls:
            calls[-1].append(kernel)
    expected = [(name, direction) for name in regimes for direction in DIRECTIONS]
    if len(calls) != len(expected) or not all(calls):
        raise RuntimeError(
            f"ncu: expected {len(expected)} calls with launches, got "
            f"{[len(launches) for launches in calls]}"
        )
    for (name, direction), launches in zip(expected, calls, strict=True):
        call = REGIMES[name]
        problem = call.problem(direction)
        reads = problem.reads_input + problem.reads_residual + (direction == "backward")
        masked = problem.mask and direction == "backward"
        chosen = plan(problem, device)
        yield CounterRow(
            *(name, call.op, direction, call.layout, call.type, call.size),
            plan=f"{chosen.algorithm} ({chosen.source})",
            launches=len(launches),
            read_bytes=sum(kernel.read for kernel in launches),
            written_bytes=sum(kernel.written for kernel in launches),
            fewest_read=reads * problem.bytes + masked * problem.mask_bytes,
            fewest=minimum_bytes(problem),
        )


def main(regimes: Sequence[str]) -> None:
    """In the child: every call once, profiled, after it ran unprofiled."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    flush = torch.ones(4 * Device.of(device).l2_bytes, dtype=torch.uint8, device=device)
    for name in regimes:
        for direction in DIRECTIONS:
            _one(REGIMES[name], direction, generator, flush)


def _one(call: Call, direction: Direction, generator: torch.Generator, flush: torch.Tensor) -> None:
    tensors = call.tensors("cuda", generator)
    for profiled in (False, True):
        y = None if direction == "forward" else tensors.forward()
        flush.sum().item()  # reads leave nothing in the cache that must be written
        if profiled:
            torch.cuda.cudart().cudaProfilerStart()
            torch.cuda._sleep(1)
        kept = tensors.forward() if y is None else tensors.backward(y)
        torch.cuda.synchronize()
        if profiled:
            torch.cuda.cudart().cudaProfilerStop()
        del kept


if __name__ == "__main__":
    main(sys.argv[1:])
