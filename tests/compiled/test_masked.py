"""The masked batch norm, compiled: no spills, no stack, sequences in accesses of 128 bits."""

from __future__ import annotations

import linecache

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bench.audit.compile import GPUS
from bench.lab.fake_driver import fake_driver
from tritonnorm.device import KNOWN, simulated
from tritonnorm.sequences.masked import masked_batch_norm

FORWARD = ["masked_moments_kernel", "combine_masked_moments_kernel", "masked_apply_kernel"]
BACKWARD = ["masked_gradient_kernel", "combine_sums_kernel", "masked_gradient_kernel"]


def target(name: str) -> GPUTarget:
    amd = name.startswith("gfx")
    return GPUTarget("hip", name, 64) if amd else GPUTarget("cuda", int(name[3:]), 32)


def run(
    layout: str, dtype: torch.dtype, activation: str | None, training: bool = True
) -> tuple[Tensor, ...]:
    shape = (32, 256, 512) if layout == "NCL" else (32, 512, 256)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    w, b = (torch.ones(256, dtype=kind, requires_grad=True) for _ in range(2))
    lengths = torch.arange(32) * 16
    running = torch.zeros(256, dtype=kind), torch.ones(256, dtype=kind)
    y = masked_batch_norm(
        x, *running, w, b, training, lengths=lengths, layout=layout, activation=activation
    )
    return torch.autograd.grad(y, (x, w, b), torch.ones_like(y))


CASES = [
    ("sm_80", "NCL", torch.bfloat16, "relu"),
    ("sm_90", "NLC", torch.bfloat16, "silu"),
    ("sm_100", "NCL", torch.float64, "relu"),
    ("gfx942", "NLC", torch.bfloat16, "relu"),
    ("gfx942", "NCL", torch.float32, "mish"),
    ("sm_90", "NLC", torch.float32, None),
]


@pytest.mark.parametrize(("name", "layout", "dtype", "activation"), CASES)
def test_compiles_well(name: str, layout: str, dtype: torch.dtype, activation: str | None) -> None:
    with simulated(KNOWN[GPUS[name]]), fake_driver(target(name)) as log:
        run(layout, dtype, activation)
        assert [launch.kernel for launch in log.launches] == FORWARD + BACKWARD
        run(layout, dtype, activation, training=False)
        reports = {}
        for launch in log.launches:
            reports[launch.variant] = log.report(launch, disassemble=False)
    seen = set()
    for report in reports.values():
        assert (report.spills, report.stack) == (0, 0), report
        for access in report.accesses:
            line = linecache.getline(access.file, access.line)
            for tensor in ("x", "y", "dy", "dx"):
                if f"({tensor}_ptr + " in line and "lane, " in line:
                    seen.add(tensor)
                    assert access.bits == 128, (report.kernel, access, line)
    assert seen == {"x", "y", "dy", "dx"}


def test_the_number_of_valid_positions_is_no_new_kernel() -> None:
    with simulated(KNOWN["h200"]), fake_driver() as log:
        run("NLC", torch.bfloat16, "relu")
        known = log.variant_count()
        x = torch.ones(16, 384, 256, dtype=torch.bfloat16)
        w, b = torch.ones(256), torch.ones(256)
        for lengths in (torch.full((16,), 7), torch.arange(16)):
            masked_batch_norm(
                x, w.clone(), b.clone(), w, b, True, lengths=lengths, layout="NLC",
                activation="relu",
            )  # fmt: skip
        assert log.variant_count() == known
