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
from tritonnorm.kernels.base import Config, EpilogueArguments
from tritonnorm.kernels.planes import vector_of
from tritonnorm.plan import choose, force_plan
from tritonnorm.problem import minimum_bytes
from tritonnorm.tune.prune import access_width

RESIDENT = BY_NAME["resident"]
KINDS = (
    *((None, None), ("relu", None), ("silu", "contiguous"), ("prelu", None)),
    ("relu", "contiguous"),
)


def rows(call: Call, direction: str = "backward") -> list[Config]:
    """The configurations with whole planes of several channels."""
    found = RESIDENT.configs(call.problem(direction), INTERPRETER)
    return sorted({config for config in found if config.block_c > 1}, key=lambda c: -c.block_c)


@pytest.mark.parametrize(
    "shape", [(5, 16, 7, 7), (9, 40, 3, 3), (1, 10, 1, 30), (33, 24, 3, 3)], ids=str
)
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
    for config in rows(call):
        matrix.check(case, "cpu", "resident", config=config)


@pytest.mark.parametrize("shape", [(33, 16, 7, 7), (40, 24, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("activation", "residual"), KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_sums_of_columns(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    activation: str | None,
    residual: str | None,
    training: bool,
) -> None:
    """Where rows are cut anywhere, and a channel's sums are those of its columns."""
    case = Case(
        *(shape, "contiguous", dtype, torch.float32, activation),
        residual=residual,
        training=training,
        slope="shared" if activation == "prelu" else None,
    )
    matrix.check(case, "cpu", "split" if training else "affine")


def test_a_mask_goes_with_whole_planes() -> None:
    """A configuration of one channel would write bytes of another layout."""
    problem = Call((33, 16, 7, 7), activation="relu", residual=True).problem("forward")
    with pytest.raises(ValueError, match=r"config: .* has no whole bytes of a mask"):
        RESIDENT.forward(problem, Config(1, 8, 64), EpilogueArguments.named("relu", ()))


@pytest.mark.parametrize("kind", [{}, {"activation": "silu", "residual": True}], ids=str)
def test_bytes(kind: dict) -> None:
    """The fewest, no race, no access out of bounds."""
    call = Call((5, 24, 3, 3), **kind)
    found = rows(call)
    assert [config.block_c for config in found] == [128, 64, 32]  # 8, 4 and 2 planes of 9
    for config in found:
        for row in count(call, "resident", config=config):
            assert row.counted == row.model == row.minimum


@pytest.mark.parametrize(("shape", "width"), [((33, 24, 3, 3), 128), ((32, 12, 3, 2), 32)])
def test_bytes_of_a_mask(shape: tuple[int, ...], width: int) -> None:
    """Blocks have whole bytes of it: 8 planes of 9 bits, or 4 of 6."""
    call = Call(shape, activation="relu", residual=True)
    found = rows(call)
    assert min(config.block_c for config in found) == width
    for config in found:
        for row in count(call, "resident", config=config):
            assert row.counted == row.model == row.minimum


def test_channels_of_a_block_stay_apart() -> None:
    """A NaN in channel 3 leaves the bits of the others as they were."""
    case = Case((5, 16, 7, 7), activation="silu")
    clean, dirty = matrix.build(case), matrix.build(case)
    dirty.x[1, 3, 2, 2] = float("nan")
    others = [c for c in range(16) if c != 3]
    with force_plan("resident", rows(Call(case.shape, False, torch.float32, "silu"))[0]):
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
    columns = 256 if device.sms <= 128 else 128  # 128 blocks of 4 planes, or 256 of 2
    assert (few.algorithm, few.config.block_c) == ("resident", columns)
    masked = Call((32, 2048, 7, 7), activation="relu", residual=True).problem(direction)
    chosen = choose(masked, device)
    assert (chosen.algorithm, chosen.config.block_c) == ("resident", 512)


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200", "b200"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_of_large_batches_too(gpu: str, direction: str, residual: bool) -> None:
    """256 samples of 2048 planes, 51 MB: 32 bits or more where one plane allows 16."""
    call = Call((256, 2048, 7, 7), activation="relu", residual=residual)
    problem, device = call.problem(direction), KNOWN[gpu]
    chosen = choose(problem, device)
    width = access_width(problem, chosen.config, device, chosen.algorithm)
    assert problem.vector == 1 and width >= (32 if chosen.algorithm == "resident" else 64)
    moved = BY_NAME[chosen.algorithm].dram_bytes(problem, chosen.config, device)
    assert moved < (1.0 if device.l2_bytes > 40 << 20 else 1.2) * minimum_bytes(problem) + 1


@pytest.mark.parametrize(("samples", "planes"), [(32, 8), (64, 8), (128, 4), (256, 2), (512, 1)])
def test_more_samples_leave_registers_for_fewer_channels(samples: int, planes: int) -> None:
    """And accesses are 128, 64, 32, or, of one channel, 16 bits wide."""
    problem = Call((samples, 2048, 7, 7), activation="relu").problem("forward")
    found = RESIDENT._found(problem, KNOWN["h200"])
    assert [vector_of(problem, config) for config in found[:1]] == ([planes] if found else [])
    assert bool(found) == (planes > 1)
