"""What Triton compiles runs on CPU tensors: the fake driver, with a launcher that launches."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget

from bench.lab.fake_driver import FakeDriver, LaunchRecord, fake_driver
from bench.lab.ptx.cache import Cache
from bench.lab.ptx.instructions import steps_of
from bench.lab.ptx.machine import Counts, run
from bench.lab.ptx.memory import GlobalMemory
from bench.lab.ptx.parse import Kernel, parse
from bench.lab.ptx.values import Array, bits_of, unsigned, width
from tritonnorm.device import Device, simulated

__all__ = ["Emulation", "emulated"]


@dataclass
class Emulation:
    """What ran. `launches` holds the name of each kernel and what it did."""

    launches: list[tuple[str, Counts]] = field(default_factory=list)


@contextlib.contextmanager
def emulated(
    device: Device,
    change: Callable[[str], str] = lambda ptx: ptx,
    besides: Callable[[], Iterable[torch.Tensor]] = tuple,
    cache: Cache | None = None,
) -> Iterator[Emulation]:
    """CPU tensors lie on ``device``, an NVIDIA GPU, and kernels run on them from their PTX.

    Args:
        device: to plan for, compile for and pretend to be.
        change: made to the PTX before it runs; to break it on purpose.
        besides: gives the tensors that a kernel may access without being called with them.
        cache: sees every access to global memory.

    Raises:
        RuntimeError: in a process that interprets kernels.
        MemoryFault: a kernel accesses memory that it must not.
    """
    found = Emulation()
    target = GPUTarget("cuda", int(device.arch.removeprefix("sm_")), device.warp)

    def launch(log: FakeDriver, record: LaunchRecord) -> None:
        compiled = log.compiled(record)
        kernel, steps = _prepared(change(compiled.asm["ptx"]))
        signature = log.variants[record.variant].signature
        values = [v for n, v in record.arguments.items() if signature[n] != "constexpr"]
        values += [0] * (len(kernel.parameters) - len(values))  # scratch memory, which none uses
        arguments = {
            name: _register(value, kind)
            for (name, kind), value in zip(kernel.parameters.items(), values, strict=True)
        }
        memory = GlobalMemory([*(v for v in values if isinstance(v, torch.Tensor)), *besides()])
        threads = 32 * record.num_warps
        shared = compiled.metadata.shared
        counts = run(*(kernel, steps, arguments, record.grid, threads, shared, memory), cache=cache)
        found.launches.append((record.kernel, counts))

    with (
        simulated(device),
        fake_driver(target, multiprocessors=device.sms, launch=launch),
        np.errstate(all="ignore"),
    ):
        yield found


@functools.lru_cache(maxsize=64)
def _prepared(ptx: str) -> tuple[Kernel, list[Any]]:
    kernel = parse(ptx)
    return kernel, steps_of(kernel)


def _register(value: Any, kind: str) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if kind[0] == "f":
        return bits_of(np.array([[value]], np.float64), kind)
    return np.array([[int(value) % (1 << width(kind))]], unsigned(width(kind)))
