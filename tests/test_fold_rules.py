"""fold: every rule folds what it should, exactly, and refuses its neighbour that is not exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonnorm
from tests.fold_models import LIMIT, Net, X, bn, conv, error, positive, rand, trained
from tritonnorm.fold import fold

Made = tuple[Callable[..., Any], dict[str, nn.Module]]


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
            lambda m, x: (z := m.b(y := x.tanh())).mul_(2.0).sum() * 0 + m.c(z) + m.d(y),
            b=bn(4),
            c=conv(4, 3, 1),
            d=conv(4, 3, 1),
        )
    )
    folded, report = fold(bad, x, verify=False)
    assert report.rows[0].decision != "folded", str(report)
    assert error(bad, folded, x) <= LIMIT


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
