"""Tiny planes as rows of all channels: right, exact in bytes, apart, chosen where it pays."""

from __future__ import annotations

import pytest
import torch

from bench.audit.traffic import count
from bench.call import DIRECTIONS, Call
from tests import matrix
from tests.cases import Case
from tritonnorm.device import INTERPRETER, KNOWN
from tritonnorm.kernels import BY_NAME
from tritonnorm.kernels.base import Config
from tritonnorm.plan import choose, force_plan

RESIDENT = BY_NAME["resident"]
KINDS = ((None, None), ("relu", None), ("silu", "contiguous"), ("prelu", None))


def rows(call: Call, direction: str = "backward") -> Config:
    """The configuration with whole planes of several channels."""
    found = RESIDENT.configs(call.problem(direction), INTERPRETER)
    return next(config for config in found if config.block_c > 1)


@pytest.mark.parametrize("shape", [(5, 16, 7, 7), (9, 40, 3, 3), (1, 10, 1, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("activation", "residual"), KINDS)
def test_matrix(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str | None, residual: str | None
) -> None:
    """A last block with fewer channels, one sample, a large mean, and all gradients."""
    call = Call(shape, False, dtype, activation, residual is not None)
    case = Case(
        *(shape, "contiguous", dtype, torch.float32, activation),
        residual=residual,
        mean=50.0,
        slope="channel" if activation == "prelu" else None,
    )
    matrix.check(case, "cpu", "resident", config=rows(call))


@pytest.mark.parametrize("kind", [{}, {"activation": "silu", "residual": True}], ids=str)
def test_bytes(kind: dict) -> None:
    """The fewest, no race, no access out of bounds."""
    call = Call((5, 24, 3, 3), **kind)
    for row in count(call, "resident", config=rows(call)):
        assert row.counted == row.model == row.minimum


def test_channels_of_a_block_stay_apart() -> None:
    """A NaN in channel 3 leaves the bits of the others as they were."""
    case = Case((5, 16, 7, 7), activation="silu")
    clean, dirty = matrix.build(case), matrix.build(case)
    dirty.x[1, 3, 2, 2] = float("nan")
    others = [c for c in range(16) if c != 3]
    with force_plan("resident", rows(Call(case.shape, False, torch.float32, "silu"))):
        a, b = (
            matrix.results(matrix.by_tritonnorm, case, d, gradients=True) for d in (clean, dirty)
        )
    for name in ("y", "dx"):
        assert torch.equal(a[name][:, others], b[name][:, others])
        assert b[name][:, 3].isnan().all()
    for name in ("dweight", "dbias", "running_mean", "running_var"):
        assert torch.equal(a[name][others], b[name][others])


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200", "b200"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_it_is_taken_where_it_fills_the_gpu(gpu: str, direction: str) -> None:
    """2048 planes of 7 by 7: 256 blocks of 8 channels, 784 bytes each row of one."""
    device = KNOWN[gpu]
    plan = choose(Call((32, 2048, 7, 7), activation="relu").problem(direction), device)
    assert (plan.algorithm, plan.config.block_c) == ("resident", 512)
    few = choose(Call((32, 512, 7, 7), activation="relu").problem(direction), device)
    assert (few.algorithm, few.config.block_c) == ("resident", 1)  # 64 blocks would not
    masked = Call((32, 2048, 7, 7), activation="relu", residual=True).problem(direction)
    assert choose(masked, device).config.block_c == 1  # a mask packs planes
