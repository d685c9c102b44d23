"""`warmup` compiles all that training and inference need, and launches nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import tritonnorm
from bench.lab.fake_driver import FakeDriver, fake_driver
from tritonnorm.device import KNOWN, simulated


@pytest.fixture
def log() -> Iterator[FakeDriver]:
    with simulated(KNOWN["h200"]), fake_driver() as found:
        yield found


def net(**options: object) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)
            self.bn = tritonnorm.BatchNorm2d(16, activation="relu", **options)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(x), residual=x)

    return nn.Sequential(
        nn.Conv2d(3, 16, 3), tritonnorm.BatchNorm2d(16, activation="silu", **options), Block()
    )


def step(model: nn.Module, x: torch.Tensor) -> None:
    model.train()
    model(x).sum().backward()
    model.eval()
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}], ids=str)
def test_the_first_step_compiles_nothing(log: FakeDriver, options: dict[str, object]) -> None:
    model, x = net(**options), torch.randn(4, 3, 18, 18)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    warm = tritonnorm.warmup(model, x)
    assert log.launches == [] and warm.compiled == warm.launches > 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    compiled = log.variant_count()
    step(model, x)
    assert log.launches and log.variant_count() == compiled
    assert tritonnorm.warmup(model.train(), x).compiled == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slopes", [1, 16])
def test_a_learned_slope(log: FakeDriver, slopes: int, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.PReLU(slopes)).to(dtype)
    tritonnorm.replace(model)
    x = torch.randn(4, 3, 18, 18, dtype=dtype)
    assert tritonnorm.warmup(model, x).compiled > 0
    compiled = log.variant_count()
    step(model, x)
    assert log.launches and log.variant_count() == compiled


def test_a_model_whose_batch_norms_are_fixed(log: FakeDriver) -> None:
    """Batch norms in eval mode with gradients: a backward with given statistics."""
    model, x = net(), torch.randn(4, 3, 18, 18)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    tritonnorm.warmup(model, x)
    compiled = log.variant_count()
    model(x).sum().backward()
    assert log.variant_count() == compiled
    step(model, x)
    assert log.variant_count() == compiled


def test_a_frozen_model(log: FakeDriver) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
    model, _ = tritonnorm.freeze(model, torch.randn(2, 3, 8, 8))
    warm = tritonnorm.warmup(model, torch.randn(4, 3, 18, 18))
    assert (warm.calls, warm.launches, warm.compiled) == (1, 2, 2) and log.launches == []
    compiled = log.variant_count()
    model(torch.randn(4, 3, 18, 18)).sum().backward()
    assert [r.kernel for r in log.launches] == ["fold_kernel", "fold_gradient_kernel"]
    assert log.variant_count() == compiled


def test_a_model_that_looks_at_values() -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(RuntimeError, match="tensors without values"):
        tritonnorm.warmup(Looks(), torch.ones(2, 3))
