"""fold: parallel branches, batch norms of other classes, several inputs, undo, baking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonnorm
from tests.fold_models import LIMIT, Net, X, bn, conv, error, rand, trained
from tritonnorm.fold import fold


class Rep(nn.Module):
    """RepVGG: 3x3 + 1x1 + identity, each with its batch norm."""

    def __init__(self, groups: int = 1, mode: str = "zeros") -> None:
        super().__init__()
        self.big = conv(4, 4, groups=groups, bias=False, padding_mode=mode)
        self.small = conv(4, 4, 1, groups=groups, bias=False)
        self.a, self.b, self.c = bn(4), bn(4), bn(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(self.big(x)) + self.b(self.small(x)) + self.c(x)).relu()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_parallel_branches_become_one(groups: int, mode: str) -> None:
    model = trained(nn.Sequential(Rep(groups, mode), Rep(groups, mode)))
    x = rand(2, 4, 6, 6)
    folded, report = fold(model, x)
    assert report.counts == {"folded": 6}, str(report)
    assert error(model, folded, x) <= LIMIT
    assert report.rows[2].rule.startswith("bn + ")
    left = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size for m in left] == [(3, 3), (3, 3)], str(report)


def test_branches_have_one_input_in_every_call() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        first = (m.b(x) + m.c(x)).tanh()
        return first + (m.b(x.sin()) + m.c(x.cos())).tanh()

    model = trained(Net(run, b=bn(4), c=conv(4, 4)))
    x = rand(2, 4, 6, 6)
    folded, report = fold(model, x, verify=False)
    assert report.counts == {"left": 1} and error(model, folded, x) == 0, str(report)


def test_branches_of_one_size_become_one() -> None:
    model = trained(
        Net(
            lambda m, x: (m.a(m.c(x)) + m.b(m.d(x))).tanh(),
            a=bn(6),
            b=bn(6),
            c=conv(4, 6, stride=2),
            d=conv(4, 6, stride=2),
        )
    )
    x = rand(2, 4, 6, 6)
    folded, report = fold(model, x)
    assert report.counts == {"folded": 2} and error(model, folded, x) <= LIMIT
    assert len([m for m in folded.modules() if isinstance(m, nn.Conv2d)]) == 1


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision and transformers: buffers, and multiplications instead of an operator."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b, mean, var = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (var + 1e-5).rsqrt()
        return x * scale + (b - mean * scale)


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm: the functional call, and children."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        args = (self.weight, self.bias, False, 0.1, self.eps)
        return self.act(self.drop(F.batch_norm(x, self.running_mean, self.running_var, *args)))


class BatchNormFunctional(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return F.relu(x)


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        (FrozenBatchNorm2d, nn.Identity),
        (BatchNormAct2d, nn.SiLU),
        (BatchNormFunctional, nn.ReLU),
        (tritonnorm.BatchNorm2d, nn.Identity),
    ],
)
def test_other_classes_are_known_by_what_they_compute(kind: Any, left: Any) -> None:
    model = trained(Net(lambda m, x: m.b(m.c(x)).tanh(), c=conv(3, 4), b=kind(4)))
    x = rand(*X)
    folded, report = fold(model, x)
    assert report.counts == {"folded": 1}, str(report)
    assert type(folded.b) is left and error(model, folded, x) <= LIMIT
    if kind is not tritonnorm.BatchNorm2d:
        _, report = fold(model)
        assert "give example_inputs" in report.rows[0].reason


def test_every_input_has_to_agree() -> None:
    model = trained(
        Net(
            lambda m, x: m.b(m.c(x)).tanh() if x.shape[0] == 2 else m.c(x).tanh(),
            c=conv(3, 4),
            b=bn(4),
        )
    )
    assert fold(model, rand(*X))[1].counts == {"folded": 1}
    _, report = fold(model, [rand(*X), rand(1, 3, 6, 6)], verify=False)
    assert "c is also called without the batch norm" in report.rows[0].reason, str(report)


def test_undo() -> None:
    model = trained(Net(lambda m, x: m.b(m.c(x)).tanh(), c=conv(3, 4, bias=False), b=bn(4)))
    before = dict(model.named_parameters())
    same, report = fold(model, rand(*X), inplace=True)
    assert same is model and type(model.b) is nn.Identity
    report.undo()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[k] is v for k, v in before.items())
    with pytest.raises(ValueError, match="undo: expected the report of a change"):
        report.undo()


def test_parametrised_weights_are_baked_on_request() -> None:
    inner = torch.nn.utils.parametrizations.weight_norm(conv(3, 4))
    model = trained(Net(lambda m, x: m.b(m.c(x)).tanh(), c=inner, b=bn(4)))
    x = rand(*X)
    assert "rules='all'" in fold(model, x)[1].rows[0].reason
    folded, report = fold(model, x, rules="all")
    assert report.counts == {"folded": 1}, str(report)
    assert error(model, folded, x) <= LIMIT and "plain weights" in str(report)
    assert torch.nn.utils.parametrize.is_parametrized(model.c)
