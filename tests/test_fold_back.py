"""fold: a batch norm goes through what comes before it, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold_models import LIMIT, Net, X, bn, conv, error, positive, rand, trained
from tritonnorm.fold import fold


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


# name: forward, modules, input, the rule of the batch norm `b`
BACK: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[int, ...], str]] = {
    "identity and dropout": (
        lambda m, x: m.b(m.d(m.i(m.c(x)))).tanh(),
        {"c": conv(3, 4), "i": nn.Identity(), "d": nn.Dropout(), "b": bn(4)},
        X,
        "conv2d -> bn",
    ),
    "flatten": (
        lambda m, x: m.b(m.c(x).flatten(0, 1)).tanh(),
        {"c": nn.Linear(5, 4), "b": nn.BatchNorm1d(4)},
        (2, 3, 5),
        "linear -> view -> bn",
    ),
    "transpose": (
        lambda m, x: m.b(m.c(x).transpose(1, 2)).tanh(),
        {"c": nn.Linear(5, 4), "b": nn.BatchNorm1d(4)},
        (2, 3, 5),
        "linear -> transpose -> bn",
    ),
    "channels to one axis": (
        lambda m, x: m.b(m.p(m.c(x)).flatten(1)).tanh(),
        {"c": conv(3, 4), "p": nn.AdaptiveAvgPool2d(1), "b": nn.BatchNorm1d(4)},
        X,
        "conv2d -> mean -> view -> bn",
    ),
    "cat": (
        lambda m, x: m.b(torch.cat([m.c(x), m.d(x)], 1)).tanh(),
        {"c": conv(3, 4), "d": conv(3, 2, 1), "b": bn(6)},
        X,
        "conv2d -> cat -> bn",
    ),
    "split": (
        lambda m, x: torch.cat(((s := m.c(x).split(2, 1))[0].tanh(), m.b(s[1])), 1).tanh(),
        {"c": conv(3, 4), "b": bn(2)},
        X,
        "conv2d -> split -> bn",
    ),
    "split behind a slice": (
        lambda m, x: (y := m.c(x))[:, :2].tanh() + m.b(y.split(2, 1)[1]).tanh(),
        {"c": conv(3, 4), "b": bn(2)},
        X,
        "conv2d -> split -> bn",
    ),
    "slices": (
        lambda m, x: torch.cat(((y := m.c(x))[:, :2].tanh(), m.b(y[:, 2:])), 1).tanh(),
        {"c": conv(3, 4), "b": bn(2)},
        X,
        "conv2d -> slice -> bn",
    ),
    "add": (
        lambda m, x: m.b(m.c(x) + m.d(x)).tanh(),
        {"c": conv(3, 4), "d": conv(3, 4, 1), "b": bn(4)},
        X,
        "conv2d -> add -> bn",
    ),
    "subtract": (
        lambda m, x: m.b(m.c(x) - 2 * m.d(x)).tanh(),
        {"c": conv(3, 4), "d": conv(3, 4, 1), "b": bn(4)},
        X,
        "conv2d -> mul -> sub -> bn",
    ),
    "numbers": (
        lambda m, x: m.b((m.c(x) + 0.5) / 3 - 1).tanh(),
        {"c": conv(3, 4), "b": bn(4)},
        X,
        "conv2d -> add -> div -> sub -> bn",
    ),
    "average pool": (
        lambda m, x: m.b(F.avg_pool2d(m.c(x), 2)).tanh(),
        {"c": conv(3, 4), "b": bn(4)},
        X,
        "conv2d -> avg_pool2d -> bn",
    ),
    "upsample": (
        lambda m, x: m.b(F.interpolate(m.c(x), scale_factor=2, mode="bilinear")).tanh(),
        {"c": conv(3, 4), "b": bn(4)},
        X,
        "conv2d -> upsample_bilinear2d -> bn",
    ),
    "nearest": (
        lambda m, x: m.b(F.interpolate(m.c(x), scale_factor=2)).tanh(),
        {"c": conv(3, 4), "b": bn(4)},
        X,
        "conv2d -> upsample_nearest2d -> bn",
    ),
    "shuffle": (
        lambda m, x: m.b(shuffle(m.c(x))).tanh(),
        {"c": conv(3, 4, groups=1), "b": bn(4)},
        X,
        "conv2d -> view -> transpose -> clone -> _unsafe_view -> bn",
    ),
    "index_select": (
        lambda m, x: m.b(m.c(x).index_select(1, torch.tensor([2, 0, 3, 1]))).tanh(),
        {"c": conv(3, 4), "b": bn(4)},
        X,
        "conv2d -> index_select -> bn",
    ),
    "pixel shuffle": (
        lambda m, x: m.b(F.pixel_shuffle(m.c(x), 2)).tanh(),
        {"c": conv(3, 8), "b": bn(2)},
        X,
        "conv2d -> pixel_shuffle -> bn",
    ),
    "max pool": (
        lambda m, x: m.b(F.max_pool2d(m.c(x), 2)).tanh(),
        {"c": conv(3, 4), "b": bn(4)},
        X,
        "conv2d -> max_pool2d_with_indices -> bn",
    ),
    "bn behind bn": (
        lambda m, x: m.b(m.a(m.c(x))).tanh(),
        {"c": conv(3, 4), "a": bn(4), "b": bn(4)},
        X,
        "conv2d -> bn",
    ),
    "bn into bn": (
        lambda m, x: m.b(m.a(x.tanh())).tanh(),
        {"a": bn(3), "b": bn(3)},
        X,
        "bn -> bn",
    ),
}


@pytest.mark.parametrize("name", BACK)
def test_through_what_comes_before(name: str) -> None:
    run, modules, shape, rule = BACK[name]
    model = positive(trained(Net(run, **modules)))
    x = rand(*shape)
    folded, report = fold(model, x)
    row = next(row for row in report.rows if row.name == "b")
    assert (row.decision, row.rule) == ("folded", rule), str(report)
    assert type(folded.b) is nn.Identity
    assert error(model, folded, x) <= LIMIT and report.error <= LIMIT
    assert row.error is not None and row.error <= LIMIT  # at its output, on real activations


@pytest.mark.parametrize("negative", [False, True])
def test_a_scale_goes_back_through_relu_when_it_is_not_negative(negative: bool) -> None:
    norm = nn.BatchNorm2d(4, affine=True)
    model = positive(trained(Net(lambda m, x: m.b(m.c(x).relu()).tanh(), c=conv(3, 4), b=norm)))
    with torch.no_grad():
        norm.bias.zero_()
        norm.running_mean.zero_()
        norm.weight[2] *= -1 if negative else 0
    x = rand(*X)
    folded, report = fold(model, x, verify=False)
    assert report.counts == {"left" if negative else "folded": 1}, str(report)
    assert error(model, folded, x) <= LIMIT
