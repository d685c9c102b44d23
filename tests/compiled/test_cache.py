"""Compiled kernels in front of a cache: what they move through it, against the model.

The GPU is a slice of an H200: two multiprocessors, with their share of its cache and bandwidth."""

from __future__ import annotations

import pytest
import torch

import tritonnorm
from bench.call import DIRECTIONS, Call
from bench.lab.ptx.cache import Cache
from bench.lab.ptx.driver import emulated
from tritonnorm.device import KNOWN, Device
from tritonnorm.kernels import BY_NAME
from tritonnorm.plan import force_plan
from tritonnorm.problem import minimum_bytes

H200 = KNOWN["h200"]
SLICE = Device("slice", "sm_90", 2, H200.l2_bytes * 2 // 132, (H200.bandwidth or 0) * 2 / 132)


def unmarked(ptx: str) -> str:
    """Nothing leaves the cache before its turn."""
    return ptx.replace("L2::evict_first", "L2::evict_normal")


def simulated(call: Call, algorithm: str, hints: bool = True) -> dict[str, int]:
    """Bytes to and from memory, forward and backward."""
    torch.manual_seed(0)
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    x, residual, dy = (
        torch.randn(call.shape, dtype=call.dtype).contiguous(memory_format=layout) for _ in range(3)
    )
    bn = tritonnorm.BatchNorm2d(call.shape[1], activation=call.activation)
    change = str if hints else unmarked
    forward, backward = Cache(SLICE.l2_bytes), Cache(SLICE.l2_bytes)
    with force_plan(algorithm):
        with emulated(SLICE, change, cache=forward):
            y = bn(x.requires_grad_(), residual.requires_grad_() if call.residual else None)
        with emulated(SLICE, change, cache=backward):
            y.backward(dy)
    return {"forward": forward.flush(), "backward": backward.flush()}


def expected(call: Call, algorithm: str) -> dict[str, tuple[int, float]]:
    """The fewest bytes, and those of the model."""
    runs, found = BY_NAME[algorithm], {}
    for direction in DIRECTIONS:
        problem = call.problem(direction)
        config = runs.heuristic(problem, SLICE)
        found[direction] = minimum_bytes(problem), runs.dram_bytes(problem, config, SLICE)
    return found


@pytest.mark.parametrize(
    ("shape", "channels_last", "algorithm"),
    [
        ((2, 64, 56, 56), False, "resident"),
        ((4, 128, 28, 28), True, "persistent"),
        ((2, 256, 56, 56), True, "persistent"),
        ((2, 64, 112, 112), False, "persistent"),
    ],
    ids=str,
)
def test_every_tensor_once(shape: tuple[int, ...], channels_last: bool, algorithm: str) -> None:
    """What is read twice is in registers or in the cache, channel group by channel group."""
    call = Call(shape, channels_last, activation="relu")
    found = simulated(call, algorithm)
    for direction, (least, model) in expected(call, algorithm).items():
        assert model == least
        assert least <= found[direction] <= 1.01 * least


def test_two_passes() -> None:
    """The second in reverse: beside what is written, half of the cache is left for what is read."""
    call = Call((2, 64, 112, 112), True, activation="relu")
    found = simulated(call, "split")
    for direction, (_, model) in expected(call, "split").items():
        assert abs(found[direction] / model - 1) < 0.01


def test_what_is_accessed_once_leaves_first() -> None:
    """Where half of the cache is not enough, hints leave more of it to what is read again: three
    tenths of what is beyond the fewest bytes are saved. Not more, as the copies of a pipeline have
    none: Triton drops it."""
    call = Call((2, 64, 112, 112), True, activation="relu", residual=True)
    found, without = simulated(call, "persistent"), simulated(call, "persistent", hints=False)
    for direction, (least, model) in expected(call, "persistent").items():
        assert least <= found[direction] < 1.02 * model
        assert found[direction] - least < 0.7 * (without[direction] - least)
