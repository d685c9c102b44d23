"""fold: a batch norm goes into what comes after it; the neighbours that are not exact stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold_models import LIMIT, Net, bn, conv, error, positive, rand, trained
from tritonnorm.fold import fold

# name: forward, modules, change of the trained model, decision, rule
AHEAD: dict[str, tuple[Callable[..., Any], dict[str, Any], Any, str, str]] = {
    "pad 0": (
        lambda m, x: m.c(m.b(x)),
        {"b": bn(4), "c": nn.Conv2d(4, 3, 3)},
        None,
        "folded",
        "bn -> conv2d",
    ),
    "grouped, no bias": (
        lambda m, x: m.c(m.b(x)),
        {"b": bn(4), "c": nn.Conv2d(4, 6, 3, groups=2, bias=False)},
        None,
        "folded",
        "bn -> grouped conv2d",
    ),
    "depthwise, reflect": (
        lambda m, x: m.c(m.b(x)),
        {"b": bn(4), "c": conv(4, 8, groups=4, padding_mode="reflect")},
        None,
        "folded",
        "bn -> grouped conv2d",
    ),
    "circular": (
        lambda m, x: m.c(m.b(x)),
        {"b": bn(4), "c": conv(4, 3, padding_mode="circular")},
        None,
        "folded",
        "bn -> conv2d",
    ),
    "replicate": (
        lambda m, x: m.c(m.b(x)),
        {"b": bn(4), "c": conv(4, 3, padding_mode="replicate")},
        None,
        "folded",
        "bn -> conv2d",
    ),
    "zero shift": (
        lambda m, x: m.c(m.b(x)),
        {"b": nn.BatchNorm2d(4, affine=False), "c": conv(4, 3)},
        lambda m: m.b.running_mean.zero_(),
        "folded",
        "bn -> conv2d",
    ),
    "zero padding": (
        lambda m, x: m.c(m.b(x)),
        {"b": bn(4), "c": conv(4, 3)},
        None,
        "reduced",
        "scale of bn -> conv2d",
    ),
    "transposed": (
        lambda m, x: m.c(m.b(x)),
        {"b": bn(4), "c": nn.ConvTranspose2d(4, 6, 3, groups=2)},
        None,
        "reduced",
        "scale of bn -> grouped conv_transpose2d",
    ),
    "linear": (
        lambda m, x: m.c(m.b(x).flatten(1)),
        {"b": bn(4), "c": nn.Linear(4 * 36, 5)},
        None,
        "folded",
        "bn -> view -> linear",
    ),
    "several users": (
        lambda m, x: m.c(y := m.b(x)) + m.d(y),
        {"b": bn(4), "c": nn.Conv2d(4, 3, 1), "d": nn.Conv2d(4, 3, 1)},
        None,
        "folded",
        "bn -> conv2d",
    ),
    "preactivation": (
        lambda m, x: m.c(m.b(x).relu()) + x.sum(1, True),
        {"b": bn(4), "c": conv(4, 3)},
        positive,
        "reduced",
        "scale of bn -> relu -> conv2d",
    ),
    "preactivation, a scale of zero": (
        lambda m, x: m.c(m.b(x).relu()),
        {"b": bn(4), "c": nn.Conv2d(4, 3, 3)},
        lambda m: positive(m).b.weight.data[1:3].zero_(),
        "reduced",
        "scale of bn -> relu -> conv2d",
    ),
    "leaky relu": (
        lambda m, x: m.c(F.leaky_relu_(m.b(x), 0.3)),
        {"b": bn(4), "c": nn.Conv2d(4, 3, 3)},
        lambda m: positive(m).b.weight.data[1:3].zero_(),
        "reduced",
        "scale of bn -> leaky_relu -> conv2d",
    ),
}


@pytest.mark.parametrize("name", AHEAD)
def test_into_what_comes_after(name: str) -> None:
    run, modules, change, decision, rule = AHEAD[name]
    model = trained(Net(run, **modules))
    if change is not None:
        with torch.no_grad():
            change(model)
    x = rand(2, 4, 6, 6)
    folded, report = fold(model, x)
    row = report.rows[0]
    assert (row.decision, row.rule) == (decision, rule), str(report)
    assert error(model, folded, x) <= LIMIT and report.error <= LIMIT
    assert torch.equal(x, rand(2, 4, 6, 6))
    if decision == "reduced":
        assert set(dict(folded.b.named_buffers())) == {"shift"}
        assert (
            "shift" in folded.state_dict()["b.shift"].__class__.__name__
            or folded.b.shift.numel() == 4
        )


# neighbours of the rules that are not exact: the batch norm stays
REFUSED: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "negative scale before relu": (
        lambda m, x: m.c(m.b(x).relu()),
        {"b": bn(4), "c": conv(4, 3)},
        "negative",
    ),
    "shift after relu": (
        lambda m, x: m.b(m.c(x).relu()).tanh(),
        {"c": conv(4, 4), "b": bn(4)},
        "shift",
    ),
    "relu6": (lambda m, x: m.b(F.relu6(m.c(x))).tanh(), {"c": conv(4, 4), "b": bn(4)}, "hardtanh"),
    "negative scale after max pool": (
        lambda m, x: m.b(F.max_pool2d(m.c(x), 2)).tanh(),
        {"c": conv(4, 4), "b": bn(4)},
        "not positive",
    ),
    "indices of a max pool": (
        lambda m, x: m.b((p := F.max_pool2d(m.c(x), 2, return_indices=True))[0]).tanh() + p[1],
        {"c": conv(4, 4), "b": bn(4)},
        "not positive",
    ),
    "average of zeros": (
        lambda m, x: m.b(F.avg_pool2d(m.c(x), 3, 2, 1)).tanh(),
        {"c": conv(4, 4), "b": bn(4)},
        "counts zero padding",
    ),
    "padded by hand": (
        lambda m, x: m.b(F.pad(m.c(x), (1, 1, 1, 1))).tanh(),
        {"c": conv(4, 4), "b": bn(4)},
        "zero padding",
    ),
    "cat with the input": (
        lambda m, x: m.b(torch.cat([m.c(x), x], 1)).tanh(),
        {"c": conv(4, 4), "b": bn(8)},
        "the model's input",
    ),
    "cat, one part used elsewhere": (
        lambda m, x: m.b(torch.cat([y := m.c(x), m.d(x)], 1)).tanh().sum() + y.tanh().sum(),
        {"c": conv(4, 4), "d": conv(4, 4), "b": bn(8)},
        "also used by tanh",
    ),
    "overlapping slices": (
        lambda m, x: m.b((y := m.c(x))[:, 1:]).tanh() + y[:, :3].tanh(),
        {"c": conv(4, 4), "b": bn(3)},
        "several ways",
    ),
    "expanded": (
        lambda m, x: m.b(m.c(x).expand(-1, 4, -1, -1)).tanh(),
        {"c": conv(4, 1), "b": bn(4)},
        "broadcast",
    ),
    "product": (
        lambda m, x: m.b(m.c(x) * m.d(x)).tanh(),
        {"c": conv(4, 4), "d": conv(4, 4), "b": bn(4)},
        "multiplication",
    ),
    "output used twice": (
        lambda m, x: m.c(y := m.b(x)) + y[:, :3].tanh(),
        {"b": bn(4), "c": conv(4, 3, 1)},
        "through tanh",
    ),
    "overwritten in place": (
        lambda m, x: m.c(F.hardtanh_(m.b(y := x + 1))) + y[:, :3],
        {"b": bn(4), "c": conv(4, 3, 1)},
        "hardtanh",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_neighbours_that_are_not_exact_stay(name: str) -> None:
    run, modules, words = REFUSED[name]
    model = trained(Net(run, **modules))
    if name == "indices of a max pool":
        positive(model).b.weight.data[0] = 0
    x = rand(2, 4, 6, 6)
    folded, report = fold(model, x, verify=False)
    assert report.counts == {"left": 1}, str(report)
    assert words in report.rows[0].reason, str(report)
    assert error(model, folded, x) == 0


def test_an_identity_must_not_share_memory_that_is_overwritten() -> None:
    """The shortcut reads y after relu_ has overwritten what the identity would have given back."""
    model = trained(
        Net(
            lambda m, x: m.c(F.leaky_relu_(m.b(y := x.tanh()) * 1, 1.0)) + m.d(y),
            b=bn(4),
            c=conv(4, 3, 1),
            d=conv(4, 3, 1),
        )
    )
    x = rand(2, 4, 6, 6)
    folded, report = fold(model, x, verify=False)
    assert error(model, folded, x) <= LIMIT, str(report)
    bad = trained(
        Net(
            lambda m, x: m.c(m.b(y := x.tanh()).mul_(2.0)) + m.d(y),
            b=bn(4),
            c=conv(4, 3, 1),
            d=conv(4, 3, 1),
        )
    )
    folded, report = fold(bad, x, verify=False)
    assert report.counts == {"reduced": 1}, str(report)  # which makes new memory
    assert error(bad, folded, x) <= LIMIT


def test_what_a_hook_sees_does_not_change() -> None:
    seen: list[Tensor] = []
    model = trained(
        Net(lambda m, x: m.c(m.i(m.b(x))), b=bn(4), i=nn.Identity(), c=nn.Conv2d(4, 3, 3))
    )
    x = rand(2, 4, 6, 6)
    assert fold(model, x)[1].counts == {"folded": 1}
    model.i.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    _, report = fold(model, x)
    assert report.counts == {"left": 1} and "hook of Identity" in report.rows[0].reason, str(report)


def test_noise_is_no_constant() -> None:
    """An addition of random numbers does not become a part of the shift."""
    model = trained(
        Net(lambda m, x: m.b(m.c(x) + torch.rand(1, 1, 1, 1).to(x)), c=conv(4, 4), b=bn(4))
    )
    _, report = fold(model, rand(2, 4, 6, 6), verify=False)
    assert report.counts == {"left": 1}, str(report)
