"""What the formula picks in each regime, on every known GPU, and the DRAM traffic it expects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.call import DIRECTIONS, Call, Direction
from tests.test_plan import Answer
from tritonnorm.device import KNOWN, Device
from tritonnorm.kernels.base import L2_SHARE, Config, cdiv
from tritonnorm.plan import FORMULA, Plan, choose, force_plan, forced
from tritonnorm.problem import Problem, minimum_bytes

each_device = pytest.mark.parametrize("device", KNOWN.values(), ids=lambda d: d.name)
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)


def planned(
    shape: tuple[int, ...], channels_last: bool, direction: Direction, device: Device, **kind: Any
) -> tuple[Problem, Plan, float]:
    """The problem, its plan, and the DRAM bytes that the plan expects over the fewest."""
    problem = Call(shape, channels_last, **({"activation": "relu"} | kind)).problem(direction)
    plan = choose(problem, device)
    moved = plan.runs.dram_bytes(problem, plan.config, device)
    return problem, plan, moved / minimum_bytes(problem)


def programs(problem: Problem, plan: Plan) -> int:
    """How many run at once, or one after the other."""
    config = plan.config
    return (config.at_once or config.channel_blocks(problem)) * config.splits


@each_device
@each_direction
@pytest.mark.parametrize("shape", [(32, 512, 7, 7), (256, 1024)], ids=str)
def test_launch_bound(shape: tuple[int, ...], direction: Direction, device: Device) -> None:
    """One launch for everything."""
    _, plan, ratio = planned(shape, False, direction, device)
    assert (plan.algorithm, ratio) == ("resident", 1.0)


@each_device
@each_direction
def test_a_channel_fits_one_program(direction: Direction, device: Device) -> None:
    """Every tensor once, no barrier in forward; backward keeps two tensors, which only 512 threads
    of CDNA hold."""
    _, plan, ratio = planned((32, 256, 28, 28), False, direction, device)
    assert ratio == 1.0
    fits = direction == "forward" or device.warp == 64
    assert plan.algorithm == ("resident" if fits else "persistent")


@each_device
@each_direction
def test_a_channel_almost_fits(direction: Direction, device: Device) -> None:
    """(256, 1024, 14, 14): 100 KB a channel are two programs' worth of registers, or the L2's."""
    _, plan, ratio = planned((256, 1024, 14, 14), False, direction, device)
    if direction == "forward" and device.arch == "gfx942":
        # Its cache holds most of x: two passes apart cost less than a barrier for every group.
        assert plan.algorithm == "split" and ratio < 1.2
    else:
        assert plan.algorithm in ("resident", "persistent") and ratio == 1.0


@each_device
@each_direction
@pytest.mark.parametrize("shape", [(64, 256, 14, 14), (32, 128, 28, 28)], ids=str)
def test_data_fits_on_the_chip(
    shape: tuple[int, ...], direction: Direction, device: Device
) -> None:
    """In one launch; x from registers, three eighths of it or more, and the rest from the L2."""
    problem, plan, ratio = planned(shape, True, direction, device)
    assert (plan.algorithm, ratio) == ("persistent", 1.0)
    if direction == "forward":
        own = cdiv(plan.config.chunks(problem), plan.config.splits)
        assert plan.config.kept >= 3 / 8 * own


@each_device
@each_direction
def test_a_channel_group_fits_the_l2(direction: Direction, device: Device) -> None:
    """411 MB in groups: each fits the cache, or a part of one is read again."""
    problem, plan, ratio = planned((256, 64, 112, 112), False, direction, device)
    assert plan.algorithm == "persistent" and ratio < 1.09
    group = plan.config.at_once * problem.bytes / problem.view.c
    tensors = 1 if direction == "forward" else 2
    kept = plan.config.kept * plan.config.tile * plan.config.splits * plan.config.at_once
    near = L2_SHARE * device.l2_bytes + tensors * kept * problem.dtype.itemsize
    assert (tensors * group <= near) == (ratio == 1.0)
    assert plan.config.at_once < problem.view.c  # the blocks of one group after another's


@each_device
@each_direction
def test_narrow_strips(direction: Direction, device: Device) -> None:
    """NHWC: blocks of 16 channels, 32 bytes of a row, so that most of a block is near."""
    problem, plan, ratio = planned((64, 64, 112, 112), True, direction, device)
    assert (plan.algorithm, plan.config.block_c) == ("persistent", 16)
    again = (1 if direction == "forward" else 2) * problem.bytes
    near = L2_SHARE * device.l2_bytes * cdiv(4, plan.config.at_once)  # of 4 blocks
    assert ratio <= 1 + max(0, again - near) / minimum_bytes(problem)


@each_device
@each_direction
def test_larger_than_that(direction: Direction, device: Device) -> None:
    """Two passes, the second in reverse: what the cache holds is saved, R = S + (S - L2)."""
    shape = (256, 64, 112, 112)
    problem, plan, ratio = planned(shape, True, direction, device, dtype=torch.float32)
    assert plan.algorithm in ("split", "persistent")
    again = (1 if direction == "forward" else 2) * problem.bytes
    streaming = 1 + (again - L2_SHARE * device.l2_bytes) / minimum_bytes(problem)
    assert 1.0 < ratio <= streaming


@each_device
@each_direction
@pytest.mark.parametrize("shape", [(20, 6, 65536), (16, 3, 224, 224)], ids=str)
def test_few_channels(shape: tuple[int, ...], direction: Direction, device: Device) -> None:
    """A channel is shared: eight warps at least on two thirds of the multiprocessors, or more
    programs."""
    problem, plan, ratio = planned(shape, False, direction, device)
    warps = programs(problem, plan) * plan.config.num_warps
    assert plan.config.splits > 1 and warps >= 8 * device.sms * 2 / 3
    assert ratio < 1.03


@each_device
@pytest.mark.parametrize("shape", [(32, 512, 7, 7), (256, 64, 112, 112), (256, 1024)], ids=str)
def test_given_statistics(shape: tuple[int, ...], device: Device) -> None:
    """Inference: one pass each way."""
    for direction in DIRECTIONS:
        _, plan, ratio = planned(shape, False, direction, device, training=False)
        assert (plan.algorithm, ratio) == ("affine", 1.0)


@each_device
def test_parameters_alone_take_one_pass(device: Device) -> None:
    problem, plan, ratio = planned((256, 64, 112, 112), True, "backward", device, needs="wb")
    assert plan.algorithm == "split" and ratio == 1.0
    assert plan.runs.model_bytes(problem, plan.config) == minimum_bytes(problem)


def test_a_deterministic_plan_is_the_formulas() -> None:
    """Tables grow; what is deterministic must not depend on them."""
    problem = Call((256, 64, 112, 112), True).problem("forward")
    h200 = KNOWN["h200"]
    tables = (Answer("user", ("split", Config(16, 1, 64, splits=7))),)
    assert choose(problem, h200, tables).source == "user"
    assert choose(problem, h200, tables, forced=FORMULA) == choose(problem, h200)
    assert forced() is None
    torch.use_deterministic_algorithms(True)
    try:
        assert forced() is FORMULA
        with force_plan("split"):
            assert forced() != FORMULA  # who forces knows what
    finally:
        torch.use_deterministic_algorithms(False)
