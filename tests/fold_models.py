"""Models and measures that the tests of fold share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritonnorm.flow.inputs import tensors_in
from tritonnorm.fold import fold
from tritonnorm.report import Report

LIMIT = 1e-9  # relative, float64
SHAPE = (2, 4, 6, 6)  # shape of an input of `net`


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with batch norms that look trained, in float64."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if not isinstance(m, nn.modules.batchnorm._BatchNorm) or m.running_mean is None:
            continue
        size = m.running_mean.shape
        m.running_mean.copy_(torch.randn(size, generator=generator) * 0.3)
        m.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
        m.num_batches_tracked.fill_(7)
        if m.weight is not None:
            m.weight.data.copy_(torch.randn(size, generator=generator))
        if m.bias is not None:
            m.bias.data.copy_(torch.randn(size, generator=generator) * 0.3)
    return model.double().eval()


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def error(model: nn.Module, folded: nn.Module, *inputs: Tensor) -> float:
    """Largest error of any output, relative to its largest value."""
    with torch.no_grad():
        pairs = zip(tensors_in(model(*inputs)), tensors_in(folded(*inputs)), strict=True)
        return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def reason(model: nn.Module, inputs: Any = None, **options: Any) -> str:
    """The reason of the only batch norm, which must be left; the output must be unchanged."""
    _, report = fold(model, inputs, **options)
    assert report.counts == {"left": 1}, str(report)
    return report.rows[0].reason


class Chain(nn.Module):
    """conv -> bn -> relu with a forward that can be chosen."""

    def __init__(self, forward: Callable[..., Any], **more: nn.Module) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)  # defined before the convolution on purpose
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        for name, module in more.items():
            setattr(self, name, module)
        self.kept: list[Any] = []
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


X = (2, 3, 6, 6)


class Net(nn.Module):
    """Named modules, and a forward that can be chosen: `run(self, x)`."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def positive(model: nn.Module) -> nn.Module:
    """The model with positive scales in its batch norms."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None:
            m.weight.data.abs_()
    return model


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def bn(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def net(run: Any, kind: type[Net] = Net, **modules: nn.Module) -> nn.Module:
    """A model with a convolution and a batch norm of 4 channels, if no others are given."""
    return trained(kind(run, **({"conv": conv(4, 4), "bn": bn(4)} | modules)))


def folded(model: nn.Module, inputs: Any = None, **options: Any) -> tuple[nn.Module, Report]:
    """Without the check of the whole model, which would take back what is wrong."""
    return fold(copy.deepcopy(model), inputs, verify=False, **options)


def same(model: nn.Module, other: nn.Module, *calls: tuple[Any, ...]) -> None:
    """Both give the same, call after call."""
    with torch.no_grad():
        for call in calls:
            expected = model(*(v.clone() if isinstance(v, Tensor) else v for v in call))
            found = other(*(v.clone() if isinstance(v, Tensor) else v for v in call))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def left(report: Report) -> str:
    """The reason for leaving the only batch norm."""
    assert report.counts == {"left": 1}
    return report.rows[0].reason
