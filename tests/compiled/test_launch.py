"""Warm launches go to the compiled kernel directly, where Triton would take the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from triton.runtime.jit import JITFunction

import tritonnorm
from bench.call import Call
from bench.lab.fake_driver import FakeDriver, fake_driver
from bench.launches import observe
from tritonnorm import force_plan
from tritonnorm.device import KNOWN, simulated
from tritonnorm.kernels import launch

CALL = Call((4, 16, 8, 8), True, torch.bfloat16, "relu", residual=True)


@pytest.fixture
def log() -> Iterator[FakeDriver]:
    with simulated(KNOWN["h200"]), fake_driver() as found:
        yield found


def tensors(call: Call = CALL):
    return call.tensors(generator=torch.Generator().manual_seed(0))


def through_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels whose launch goes through Triton's own look-up, from now on."""
    seen: list[str] = []
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        seen.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return seen


@pytest.mark.parametrize("algorithm", ["resident", "split"])
def test_a_warm_launch_is_the_same_without_a_look_up(log, monkeypatch, algorithm: str) -> None:
    t = tensors()
    with force_plan(algorithm):
        t.backward(t.forward())
        cold = list(log.launches)
        log.launches.clear()
        seen = through_triton(monkeypatch)
        t.backward(t.forward())
    assert seen == [] and len(log.launches) == len(cold) >= 2
    for before, after in zip(cold, log.launches, strict=True):
        assert (before.kernel, before.grid, before.variant, before.num_warps) == (
            *(after.kernel, after.grid, after.variant),
            after.num_warps,
        )
        assert list(before.arguments) == list(after.arguments)
        for name, value in before.arguments.items():
            if not isinstance(value, torch.Tensor):
                assert after.arguments[name] is value or after.arguments[name] == value
            else:
                assert after.arguments[name].shape == value.shape


@pytest.mark.parametrize(
    "other",
    [
        Call((4, 17, 8, 8), True, torch.bfloat16, "relu", residual=True),  # C: not a multiple of 16
        Call((4, 16, 8, 8), True, torch.float16, "relu", residual=True),
        Call((4, 16, 8, 8), True, torch.bfloat16, "relu6", residual=True),
        Call((4, 16, 8, 8), True, torch.bfloat16, "relu"),
        Call((1, 16, 8, 8), False, torch.bfloat16, "relu", residual=True),  # N: 1 is a constant
        Call((4, 16, 8, 8), False, torch.bfloat16, "leaky_relu", residual=True),
    ],
    ids=str,
)
def test_what_triton_compiles_anew_is_looked_up_anew(log, monkeypatch, other: Call) -> None:
    with force_plan("split"):
        tensors().forward()
        known = len(log.variants)
        seen = through_triton(monkeypatch)
        tensors(other).forward()
    assert "apply_kernel" in seen and len(log.variants) > known


def test_the_alignment_of_a_tensor_matters(log, monkeypatch) -> None:
    t = tensors()
    t.forward()
    known = len(log.variants)
    memory = torch.empty(t.bias.numel() + 1)
    t.bias = memory[1:].copy_(t.bias.detach()).requires_grad_()
    assert t.bias.data_ptr() % 16 != 0
    seen = through_triton(monkeypatch)
    t.forward()
    assert seen == ["forward_kernel"] and len(log.variants) == known + 1


@pytest.mark.parametrize("number", [1, True, np.float32(0.25), np.float64(0.25)], ids=repr)
def test_numbers_of_all_kinds_are_floats(log, number) -> None:
    """The interpreter takes any; a compiled kernel takes 64-bit floats."""
    for _ in range(2):  # cold, and warm
        bn = tritonnorm.BatchNorm2d(16, eps=number, momentum=number)
        bn(torch.randn(4, 16, 8, 8))
        tritonnorm.LayerNorm(16, eps=number)(torch.randn(4, 16))
    norm, _, again, _ = log.launches
    for one in (norm, again):
        given = (one.arguments["eps"], one.arguments["momentum"])
        assert given == (number, number) and list(map(type, given)) == [float, float]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kind_of_calls_has_launches_of_its_own(log, monkeypatch, dtype) -> None:
    """The same input, and weights of other dtypes or none: each gets the kernel for its own."""
    x = torch.randn(4, 16, 8, 8, dtype=torch.bfloat16)
    statistics = torch.zeros(16), torch.ones(16)
    vectors = (None, torch.ones(16, dtype=dtype), torch.ones(16))
    for _ in range(2):
        for weight in vectors:
            tritonnorm.functional.batch_norm(x, *statistics, weight, training=True)
    kinds = [log.variants[one.variant].signature["weight_ptr"] for one in log.launches]
    assert kinds[:3] == kinds[3:]
    narrow = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    assert kinds[1:3] == [narrow, "*fp32"] and kinds[0] == "constexpr"
    seen = through_triton(monkeypatch)
    tritonnorm.functional.batch_norm(x, *statistics, vectors[1], training=True)
    assert seen == []


def test_another_shape_of_the_same_kind_is_no_new_kernel(log) -> None:
    with force_plan("split"):
        tensors(Call((64, 64, 32, 32), True, torch.bfloat16, "relu")).forward()
        known = len(log.variants)
        tensors(Call((3, 128, 48, 57), True, torch.bfloat16, "relu")).forward()
    assert len(log.variants) == known


def test_a_driver_that_ended_leaves_nothing() -> None:
    before = dict(launch._compiled)
    with simulated(KNOWN["h200"]), fake_driver():
        tensors().forward()
        assert len(launch._compiled) > len(before)
    assert launch._compiled == before


def test_launches_are_observed(log) -> None:
    t = tensors()
    for _ in range(2):  # cold, and what is kept of it
        with observe() as seen:
            t.forward()
        assert seen.compiled == {"forward_kernel": 1}
    t.forward()
    assert seen.compiled == {"forward_kernel": 1}
