"""What computed a batch norm is observed, not assumed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonnorm
from bench.launches import observe
from tritonnorm import force_plan


def step(module: nn.Module) -> None:
    module(torch.randn(4, 3, 5, 5, requires_grad=True)).sum().backward()


def test_kernels_in_the_interpreter() -> None:
    with force_plan("split"), observe() as seen:
        step(tritonnorm.BatchNorm2d(3))
    assert seen.interpreted == {
        "moments_kernel": 1, "combine_moments_kernel": 1, "apply_kernel": 1,
        "gradient_kernel": 2, "combine_sums_kernel": 1,
    }  # fmt: skip
    assert not seen.compiled and not seen.torch
    assert str(seen) == (
        "6 launches of 5 kernels in Triton's interpreter, 0 calls of PyTorch's batch norm"
    )


def test_the_fallback_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")
    with observe() as seen:
        step(tritonnorm.BatchNorm2d(3))
    assert not seen.interpreted and not seen.compiled
    assert sum(seen.torch.values()) >= 1


def test_pytorch_own_modules_and_nothing_after_the_block() -> None:
    with observe() as seen:
        step(nn.BatchNorm2d(3))
    calls = sum(seen.torch.values())
    assert calls >= 1 and not seen.interpreted
    step(nn.BatchNorm2d(3))
    step(tritonnorm.BatchNorm2d(3))
    assert sum(seen.torch.values()) == calls and not seen.interpreted
