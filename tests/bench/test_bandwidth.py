"""The GPU part of the demo on a CPU: all but the timing, which a clock of our own replaces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.call import Call, Tensors
from bench.demo import bandwidth
from bench.demo.bandwidth import EAGER, OURS
from tritonnorm.device import INTERPRETER, simulated
from tritonnorm.problem import minimum_bytes

CALLS = [
    Call((4, 16, 4, 4), True, torch.bfloat16, "relu"),
    Call((4, 2, 4, 8), False, torch.float32, "relu", residual=True),
]


class Clock:
    """Runs everything once and says that it took a millisecond a call."""

    def __init__(self) -> None:
        self.sets: list[int] = []

    def prepare(self, calls):
        self.sets.append(len(calls))
        for call in calls:
            call()
        return lambda: 1e-3


def test_rows_and_roof() -> None:
    clock = Clock()
    said: list[float] = []
    with simulated(replace(INTERPRETER, l2_bytes=5000)):
        found = bandwidth.run(
            lambda done, of, what="": said.append(done / of), "cpu", CALLS, clock, rounds=2
        )
    assert len(found.rows) == len(CALLS) * 2 * 2
    assert found.copy == 2 * (1 << 20) / 1e-3  # a MiB at least, read and written
    for row in found.rows:
        fewest = minimum_bytes(row.call.problem("forward"))
        if row.mode == "forward+backward":
            fewest += minimum_bytes(row.call.problem("backward"))
        assert row.bytes == fewest and row.bandwidth == fewest / 1e-3
        assert 0 < row.error < 0.05
    assert [row.provider for row in found.rows] == [OURS, EAGER] * 4
    for row, sets in zip(found.rows[2::4], clock.sets[1::4], strict=True):
        assert sets > 1 and sets * row.bytes >= 4 * 5000  # together they exceed four caches
    assert said[0] == 0 and said[-1] == 1


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Tensors.forward
    monkeypatch.setattr(Tensors, "forward", lambda self: forward(self) * 1.05)
    clock = Clock()
    with pytest.raises(RuntimeError, match=r"error .*, PyTorch's"):
        bandwidth.run(device="cpu", calls=CALLS[1:], clock=clock, rounds=1)
    assert clock.sets == [1]  # the roof alone


def test_the_layers_are_those_of_resnet50() -> None:
    from bench.layers import RESNET50

    planes = {(layer.channels, *layer.plane) for layer in RESNET50}
    assert {call.shape[1:] for call in bandwidth.layers()} <= planes
    assert {call.channels_last for call in bandwidth.layers()} == {True, False}
