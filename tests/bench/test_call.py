"""A call describes to the planner what the operators will ask it."""

from __future__ import annotations

import pytest
import torch

from bench.call import Call
from tritonnorm import ops


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "channels_last"), [((2, 3, 4, 5), False), ((2, 3, 4, 5), True), ((6, 5), False)]
)
@pytest.mark.parametrize(
    ("activation", "residual"),
    [(None, False), ("relu", False), (None, True), ("relu", True), ("gelu", True)],
)
@pytest.mark.parametrize("needs", ["xrwb", "x", "wb", "b"])
def test_problems_are_those_of_the_operators(
    monkeypatch: pytest.MonkeyPatch, training, shape, channels_last, activation, residual, needs
) -> None:
    call = Call(shape, channels_last, torch.float32, activation, residual, training, needs)
    asked = []
    recipe = ops.recipe

    def recorded(*args, **options):
        found = recipe(*args, **options)
        asked.append(found.problem)
        return found

    monkeypatch.setattr(ops, "recipe", recorded)
    monkeypatch.setattr(ops, "of_kinds", {})
    tensors = call.tensors(generator=torch.Generator().manual_seed(0))
    tensors.backward(tensors.forward())
    assert asked == [call.problem("forward"), call.problem("backward")]


def test_names() -> None:
    call = Call((2, 3, 4, 5), True, torch.float16, "relu", True, False)
    assert (call.op, call.layout, call.mode, call.size, call.type) == (
        "BN+add+relu", "NHWC", "inference", "2x3x4x5", "float16",
    )  # fmt: skip
    assert Call((2, 3)).op == "BN"


def test_random_values_or_none() -> None:
    call = Call((2, 3, 4, 5), dtype=torch.float64)
    one, two = (call.tensors(generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one.x, two.x) and not torch.equal(one.x, one.dy)
    assert one.weight.dtype == torch.float64 and one.x.std() > 0.5


def test_channels_last_needs_planes() -> None:
    with pytest.raises(ValueError, match="channels_last: expected 4 or 5 dimensions, got 3"):
        Call((2, 3, 4), True).problem("forward")
