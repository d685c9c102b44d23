"""PTX in a line or two, run on tensors."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from bench.lab.ptx.cache import Cache
from bench.lab.ptx.instructions import steps_of
from bench.lab.ptx.machine import Counts, run
from bench.lab.ptx.memory import GlobalMemory
from bench.lab.ptx.parse import parse


def launch(
    body: str,
    *tensors: Tensor,
    grid: int = 1,
    threads: int = 32,
    shared: int = 0,
    cache: Cache | None = None,
) -> Counts:
    """Run PTX on tensors: %rd1, %rd2, ... are where they begin, %r1 the thread, %r2 the program."""
    parameters = ",\n".join(f".param .u64 .ptr .global p{i}" for i in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [p{i}];" for i in range(len(tensors)))
    kernel = parse(
        f""".version 8.7
        .extern .shared .align 16 .b8 memory[];
        .visible .entry kernel(\n{parameters}\n)\n.reqntid {threads}\n{{
        .reg .pred %p<9>; .reg .b16 %rs<20>; .reg .b32 %r<40>; .reg .b64 %rd<40>;
        {loads}
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, %ctaid.x;
        {body}
        ret;
        }}"""
    )
    arguments = {f"p{i}": np.array([[t.data_ptr()]], np.uint64) for i, t in enumerate(tensors)}
    steps, memory = steps_of(kernel), GlobalMemory(tensors)
    with np.errstate(all="ignore"):
        return run(kernel, steps, arguments, (grid, 1, 1), threads, shared, memory, cache=cache)


def at(tensor: int, size: int, to: int) -> str:
    """Puts into %rd<to> where the element of the thread lies."""
    return f"mul.wide.u32 %rd{to}, %r1, {size}; add.s64 %rd{to}, %rd{to}, %rd{tensor};"
