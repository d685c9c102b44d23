"""The models on which other folding tools are silently wrong, give up, or fold nothing; by name.

Each is the part that matters of the model whose name it has, so nothing has to be installed;
tests/test_fold_zoo.py has those that can be built from their library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold_models import LIMIT, Net, bn, conv, error, positive, rand, trained
from tests.test_fold_rules import FrozenBatchNorm2d
from tritonnorm.fold import fold


def polynet() -> nn.Module:
    """One convolution, a batch norm for each of its calls."""

    def run(m: Any, x: Tensor) -> Tensor:
        for norm in m.norms:
            x = norm(m.conv(x)).relu()
        return x

    return Net(run, conv=conv(4, 4, bias=False), norms=nn.ModuleList([bn(4), bn(4), bn(4)]))


def preresnet() -> nn.Module:
    """The output of a convolution goes into a batch norm and into the shortcut."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.b(m.a(x).relu_()) + x

    return Net(run, stem=conv(4, 4), a=bn(4), b=conv(4, 4))


def wrn_1bit() -> nn.Module:
    """The weight is computed in the forward."""

    class Binary(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight.sign() * 0.1, None, 1, 1)

    return Net(lambda m, x: m.b(m.c(x)).tanh(), c=Binary(4, 4, 3), b=bn(4))


def octresnet() -> nn.Module:
    """Parts of one weight are used for several convolutions, by the module's own forward."""

    class Octave(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            high = F.conv2d(input, self.weight[:2], self.bias[:2], padding=1)
            low = F.conv2d(F.avg_pool2d(input, 2), self.weight[2:], self.bias[2:], padding=1)
            return torch.cat([high, F.interpolate(low, scale_factor=2)], 1)

    return Net(lambda m, x: m.b(m.c(x)).tanh(), c=Octave(4, 4, 3), b=bn(4))


def nfnet() -> nn.Module:
    """Weight standardisation written with F.batch_norm(training=True): no batch norm at all."""

    class ScaledStdConv2d(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            weight = F.batch_norm(
                self.weight.reshape(1, self.out_channels, -1), None, None, training=True
            ).reshape_as(self.weight)
            return F.conv2d(input, weight, self.bias, padding=self.padding)

    return Net(lambda m, x: m.b(m.c(x)).tanh(), c=ScaledStdConv2d(4, 4, 3, padding=1), b=bn(4))


def ibn_resnet() -> nn.Module:
    """Half of the channels go into an instance norm, half into a batch norm."""

    def run(m: Any, x: Tensor) -> Tensor:
        first, second = torch.split(m.c(x), 4, 1)
        return torch.cat([m.i(first.contiguous()), m.b(second.contiguous())], 1).relu()

    return Net(run, c=conv(4, 8, bias=False), i=nn.InstanceNorm2d(4, affine=True), b=bn(4))


def mixnet() -> nn.Module:
    """A batch norm behind the concatenation of several depthwise convolutions."""

    def run(m: Any, x: Tensor) -> Tensor:
        parts = x.split(2, 1)
        return m.b(torch.cat([c(p) for c, p in zip(m.convs, parts, strict=True)], 1)).relu()

    convs = nn.ModuleList([conv(2, 2, 3, groups=2), conv(2, 2, 5, groups=2)])
    return Net(run, convs=convs, b=bn(4))


def levit() -> nn.Module:
    """Linear -> flatten -> BatchNorm1d -> reshape_as."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.c(x.flatten(2).transpose(1, 2))
        return m.b(x.flatten(0, 1)).reshape_as(x).tanh()

    return Net(run, c=nn.Linear(4, 6, bias=False), b=nn.BatchNorm1d(6))


def condensenet() -> nn.Module:
    """A channel shuffle between the convolution and the batch norm."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.c(x)
        n, c, h, w = x.shape
        return m.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)).relu()

    return Net(run, c=conv(4, 8, groups=2), b=bn(8))


def convmixer() -> nn.Module:
    """GELU before each batch norm, whose output is also the shortcut."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(F.gelu(m.stem(x)))
        return m.b(F.gelu(m.c(y))) + y

    return Net(run, stem=conv(4, 4), a=bn(4), c=conv(4, 4), b=bn(4))


def repghostnet() -> nn.Module:
    """A batch norm on a batch norm, in a branch without a convolution."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.c(x))
        return (y + m.d(y)).relu()

    return Net(run, c=conv(4, 4, bias=False), b=bn(4), d=bn(4))


def pspnet() -> nn.Module:
    """Some batch norms are never executed."""
    return Net(lambda m, x: m.b(m.c(x)).relu(), c=conv(4, 4), b=bn(4), unused=bn(4))


def detr() -> nn.Module:
    """No batch norm module, but multiplications by frozen statistics."""
    return Net(lambda m, x: m.b(m.c(x)).relu(), c=conv(4, 4, bias=False), b=FrozenBatchNorm2d(4))


def dpt() -> nn.Module:
    """Convolutions and batch norms defined in another order than they are called in."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.b2(m.c2(m.b1(m.c1(x)).relu())) + x

    return Net(run, b2=bn(4), c1=conv(4, 4), c2=conv(4, 4), b1=bn(4))


def repvgg() -> nn.Module:
    """An identity branch with a batch norm, beside convolutions."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = x.relu()
        return (m.a(m.big(x)) + m.b(m.small(x)) + m.c(x)).relu()

    return Net(run, big=conv(4, 4), small=conv(4, 4, 1), a=bn(4), b=bn(4), c=bn(4))


def transposed() -> nn.Module:
    """Groups in a transposed convolution: the scale belongs to the second axis, group by group."""
    up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
    return Net(lambda m, x: m.b(m.c(x)).relu(), c=up, b=bn(4))


# name: the model, what becomes of its batch norms, words of the reason of one that stays
TRAPS: dict[Callable[[], nn.Module], tuple[dict[str, int], str]] = {
    polynet: ({"folded": 3}, ""),
    preresnet: ({"reduced": 1}, ""),
    wrn_1bit: ({"left": 1}, "no scale and shift pass through convolution"),
    octresnet: ({"left": 1}, "no scale and shift pass through convolution"),
    nfnet: ({"left": 1}, "no scale and shift pass through convolution"),
    ibn_resnet: ({"folded": 1}, ""),
    mixnet: ({"folded": 1}, ""),
    levit: ({"folded": 1}, ""),
    condensenet: ({"folded": 1}, ""),
    convmixer: ({"left": 2}, "no scale and shift pass through gelu"),
    repghostnet: ({"folded": 1, "left": 1}, "also used by"),
    pspnet: ({"folded": 1, "left": 1}, "not executed"),
    detr: ({"folded": 1}, ""),
    dpt: ({"folded": 2}, ""),
    repvgg: ({"folded": 3}, ""),
    transposed: ({"folded": 1}, ""),
}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_traps_by_name(trap: Callable[[], nn.Module]) -> None:
    counts, words = TRAPS[trap]
    torch.manual_seed(0)
    model = positive(trained(trap()))
    x = rand(2, 4, 8, 8)
    folded, report = fold(model, x)
    assert report.counts == counts, str(report)
    assert error(model, folded, x) <= LIMIT and (report.error or 0) <= LIMIT
    assert words in str(report.skipped)
    unverified, _ = fold(model, x, verify=False)
    assert error(model, unverified, 3 * x) <= LIMIT


def test_the_weight_standardisation_is_mentioned() -> None:
    _, report = fold(trained(nfnet()), rand(2, 4, 8, 8))
    assert "1 call of F.batch_norm" in str(report)
