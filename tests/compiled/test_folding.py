"""The folding kernels, compiled: no spills, no stack, weights in accesses of 128 bits."""

from __future__ import annotations

import linecache

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bench.audit.compile import GPUS
from bench.lab.fake_driver import fake_driver
from tritonnorm import fold_ops, folding, frozen
from tritonnorm.device import KNOWN, simulated
from tritonnorm.folding import Source
from tritonnorm.kernels import folding as kernels

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def source(shape: tuple[int, ...], dtype: torch.dtype) -> Source:
    def vector() -> Tensor:
        return torch.ones(shape[0], dtype=dtype)

    return Source(
        torch.ones(shape, dtype=dtype), None, vector(), vector(), vector(), vector(), 1e-5
    )


def target(name: str) -> GPUTarget:
    amd = name.startswith("gfx")
    return GPUTarget("hip", name, 64) if amd else GPUTarget("cuda", int(name[3:]), 32)


def expected_width(dtype: torch.dtype, warp: int) -> int:
    """A thread has 1024 / (4 warps) elements of a tile, and an access is at most 128 bits."""
    return min(128, 1024 // (4 * warp) * dtype.itemsize * 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(GPUS))
def test_compiles_well(name: str, dtype: torch.dtype) -> None:
    device = KNOWN[GPUS[name]]
    sources = [source((8, 3, 3, 3), dtype), source((64, 64, 3, 3), dtype)]
    columns = [list(column) for column in zip(*sources, strict=True)]
    with simulated(device), fake_driver(target(name)) as log:
        fold_ops.forward(*columns)
        fold_ops.backward(columns[0], columns[2], *columns)
        assert [launch.kernel for launch in log.launches] == ["fold_kernel", "fold_gradient_kernel"]
        reports = [log.report(launch, disassemble=False) for launch in log.launches]
    for report, names in zip(reports, (("w", "folded"), ("w", "dy", "dw")), strict=True):
        assert report.target == name and report.spills == report.stack == 0, report
        widest: dict[str, int] = {}
        for access in report.accesses:
            line = linecache.getline(access.file, access.line)
            for tensor in names:
                if f"({tensor}_ptr + at" in line:
                    widest[tensor] = max(access.bits, widest.get(tensor, 0))
        assert widest == dict.fromkeys(names, expected_width(dtype, device.warp))


def test_a_step_of_many_pairs_is_two_launches_and_one_variant_each() -> None:
    made = [source((c, 16, 3, 3), torch.float32) for c in (8, 16, 20, 33)]
    for s in made:
        s.weight.requires_grad_()
    with simulated(KNOWN["h200"]), fake_driver() as log:
        for _ in range(3):
            folded = frozen.fold_all(made)
            sum(f.weight.sum() + f.bias.sum() for f in folded).backward()  # type: ignore[union-attr]
        assert [launch.kernel for launch in log.launches] == [
            "fold_kernel", "fold_gradient_kernel",
        ] * 3  # fmt: skip
        assert log.variant_count() == 2
        frozen.fold_all(made[1:])  # another model: the same code
        assert log.variant_count() == 2
        assert {launch.grid for launch in log.launches[:2]} == {(_programs(made), 1, 1)}


def _programs(sources: list[Source]) -> int:
    tiles = kernels.tiles_of(kernels.USUAL)
    blocks = [tiles[kernels.tile_kind(s.weight, kernels.layout(s))][0] for s in sources]  # type: ignore[arg-type]
    return sum(-(-s.mean.numel() // b) for s, b in zip(sources, blocks, strict=True))


def test_folding_is_a_leaf_that_needs_no_kernel() -> None:
    """Outside of the simulation a CPU tensor is folded by the expression."""
    s = source((8, 4), torch.float32)
    with fake_driver() as log:
        (found,) = frozen.fold_all([s])
    assert log.launches == []
    torch.testing.assert_close(found.weight, folding.fold(s).weight.float())
