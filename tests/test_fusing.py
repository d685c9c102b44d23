"""replace fuses a batch norm with what follows it, wherever the code of a model shows that."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold_models import Net, bn, conv
from tritonnorm import activation as activations
from tritonnorm.fusing.forward import WIDENED
from tritonnorm.replace import replace

LIMIT = 1e-10


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")


def image() -> Tensor:
    return torch.randn(2, 4, 5, 5, dtype=torch.float64)


def steps_alike(ours: nn.Module, theirs: nn.Module, *inputs: Tensor) -> None:
    """Outputs, gradients and buffers of a step in each mode."""
    for training in (True, False):
        got = []
        for model in (ours.train(training), theirs.train(training)):
            torch.manual_seed(0)
            given = [x.clone().requires_grad_() for x in inputs]
            y = model(*(x * 1 for x in given))
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            got.append([y, *(x.grad for x in given), *gradients, *model.buffers()])
            model.zero_grad()
        assert len(got[0]) == len(got[1])
        for a, b in zip(*got, strict=True):
            torch.testing.assert_close(a, b, rtol=LIMIT, atol=LIMIT)


def rules(model: nn.Module, **options: Any) -> dict[str, str]:
    """The rule of each fused batch norm; the model must compute what it did."""
    theirs = copy.deepcopy(model.double())
    _, report = replace(model, **options)
    steps_alike(model, theirs, image())
    return {row.name: row.rule for row in report.rows if row.decision == "fused"}


def why(model: nn.Module, **options: Any) -> str:
    """Why the only batch norm is not fused."""
    theirs = copy.deepcopy(model.double())
    _, report = replace(model, **options)
    (row,) = report.rows
    assert row.decision == "replaced", str(report)
    steps_alike(model, theirs, image())
    return row.reason


def swish(m: Any, x: Tensor) -> Tensor:
    y = m.b(x)
    return y * torch.sigmoid(y)


def hard_swish(m: Any, x: Tensor) -> Tensor:
    y = m.b(x)
    return y * F.relu6(y + 3.0, inplace=True) / 6.0


ACTIVATIONS: list[tuple[str, Any]] = [
    ("relu", lambda m, x: m.a(m.b(x))),
    ("relu", lambda m, x: F.relu(m.b(x))),
    ("relu", lambda m, x: F.relu(m.b(x), inplace=True)),
    ("relu", lambda m, x: torch.relu_(m.b(x))),
    ("relu", lambda m, x: m.b(m.c(x)).relu()),
    ("relu", lambda m, x: m.b(x).relu_()),
    ("relu", lambda m, x: m.a(m.same(m.b(x)))),
    ("relu6", lambda m, x: F.hardtanh(m.b(x), 0.0, 6.0)),
    ("relu6", lambda m, x: F.relu6(m.b(x))),
    ("leaky_relu", lambda m, x: F.leaky_relu(m.b(x), 0.2)),
    ("leaky_relu", lambda m, x: F.leaky_relu(m.b(x), negative_slope=0.3, inplace=True)),
    ("silu", lambda m, x: F.silu(m.b(x))),
    ("silu", swish),
    ("hardswish", lambda m, x: F.hardswish(m.b(x))),
    ("hardswish", hard_swish),
    ("hardsigmoid", lambda m, x: F.hardsigmoid(m.b(x))),
    ("sigmoid", lambda m, x: m.b(x).sigmoid()),
    ("tanh", lambda m, x: torch.tanh(m.b(x))),
    ("gelu", lambda m, x: F.gelu(m.b(x))),
    ("gelu_tanh", lambda m, x: F.gelu(m.b(x), approximate="tanh")),
    ("elu", lambda m, x: F.elu(m.b(x), 0.5)),
    ("mish", lambda m, x: F.mish(m.b(x))),
    ("softplus", lambda m, x: F.softplus(m.b(x), 2.0)),
    ("prelu", lambda m, x: m.p(m.b(x))),
    ("prelu", lambda m, x: m.p(m.same(m.b(m.c(x))))),
    ("prelu", lambda m, x: F.prelu(m.b(x), m.p.weight)),
    ("prelu", lambda m, x: F.prelu(m.b(x), weight=m.p.weight)),
    ("prelu", lambda m, x: torch.prelu(m.b(x), m.p.weight)),
    ("prelu", lambda m, x: m.b(x).prelu(m.p.weight)),
]


@pytest.mark.parametrize(("name", "run"), ACTIVATIONS)
def test_activations(name: str, run: Callable[..., Tensor]) -> None:
    parts = {"a": nn.ReLU(inplace=True), "p": nn.PReLU(4), "same": nn.Identity()}
    model = Net(run, b=bn(4), c=conv(4, 4), **parts)
    assert rules(model, example_inputs=image()) == {"b": f"bn -> {name}"}


MODULES = [
    nn.ReLU6(),
    nn.LeakyReLU(0.2),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Hardtanh(0.0, 6.0),
    nn.ELU(0.5),
    nn.Softplus(2.0),
    nn.PReLU(),
    nn.PReLU(4),
]


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_activation_modules(module: nn.Module) -> None:
    assert len(rules(nn.Sequential(conv(4, 4), bn(4), module))) == 1


def inplace_add(m: Any, x: Tensor) -> Tensor:
    out = m.b(m.c(x))
    out += x
    return m.a(out)


def method_add(m: Any, x: Tensor) -> Tensor:
    return m.b(m.c(x)).add_(x).relu()


ADDS: list[tuple[str, Any]] = [
    ("bn -> add -> relu", lambda m, x: m.a(m.b(m.c(x)) + x)),
    ("bn -> add -> relu", lambda m, x: m.a(x + m.b(m.c(x)))),
    ("bn -> add -> relu", lambda m, x: m.a(torch.add(x, m.b(m.c(x))))),
    ("bn -> add -> relu", inplace_add),
    ("bn -> add -> relu", method_add),
    ("bn -> add", lambda m, x: torch.softmax(m.b(m.c(x)) + x, 1)),
    ("bn -> add -> silu", lambda m, x: F.silu(operator.add(m.b(m.c(x)), x.tanh()))),
]


@pytest.mark.parametrize(("rule", "run"), ADDS)
def test_additions(rule: str, run: Callable[..., Tensor]) -> None:
    model = Net(run, b=bn(4), c=conv(4, 4), a=nn.ReLU(inplace=True))
    assert rules(model, example_inputs=image()) == {"b": rule}


def overwritten(write: Callable[[Any, Tensor], Any]) -> Callable[..., Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        z = m.c(x)
        y = F.silu(m.b(m.c(x)) + z)
        write(m, z)
        return y

    return run


@pytest.mark.parametrize(
    "write",
    [
        lambda m, z: z.mul_(2),
        lambda m, z: F.relu(z, inplace=True),
        lambda m, z: m.a(z),
        lambda m, z: operator.imul(z, 2),
        lambda m, z: torch.relu_(z),
    ],
)
def test_a_residual_that_is_written_later(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused backward reads it, and would raise an error."""
    monkeypatch.delenv("TRITONNORM_DISABLE")
    model = Net(overwritten(write), b=bn(4), c=conv(4, 4), a=nn.ReLU(inplace=True))
    assert "overwritten later" in why(model)


@pytest.mark.parametrize("read", [lambda m, z: z.mul(2), lambda m, z: m.a(z), lambda m, z: z + 1])
def test_a_residual_that_is_read_later(read: Any) -> None:
    model = Net(overwritten(read), b=bn(4), c=conv(4, 4), a=nn.ReLU())
    assert rules(model) == {"b": "bn -> add -> silu"}


def shortcut(m: Any, x: Tensor) -> Tensor:
    identity = x
    out = m.a(m.b(m.c(x)))
    out = m.b2(m.c2(out))
    if m.down is not None:
        identity = m.down(x)
    out += identity
    return m.a(out)


def block(down: bool = True) -> Net:
    """A block of a residual network: one activation module, called twice."""
    more = nn.Sequential(conv(4, 4, 1), bn(4)) if down else None
    modules = {"c": conv(4, 4), "b": bn(4), "c2": conv(4, 4), "b2": bn(4)}
    return Net(shortcut, **modules, a=nn.ReLU(inplace=True), down=more)  # type: ignore[arg-type]


def test_of_two_batch_norms_that_are_added_one_is_fused() -> None:
    assert rules(block()) == {"b": "bn -> relu", "b2": "bn -> add -> relu"}
    _, report = replace(block())
    assert "on the other side" in report.rows[2].reason


class Gated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def test_across_modules() -> None:
    inner = nn.Sequential(conv(4, 4), bn(4), nn.Identity())
    outer = Net(lambda m, x: F.relu(m.i(x) + x), i=inner)
    assert rules(outer) == {"i.1": "bn -> add -> relu"}
    assert "forward" not in inner.__dict__  # the sum is not in its code
    assert rules(nn.Sequential(conv(4, 4), bn(4), Gated())) == {"1": "bn -> silu"}
    tail = Net(lambda m, x: m.c(F.relu(x)), c=conv(4, 4))
    assert rules(nn.Sequential(nn.Sequential(conv(4, 4), bn(4)), tail)) == {"0.1": "bn -> relu"}


def test_a_block_that_is_called_twice_and_one_that_is_walked_through() -> None:
    shared = block(down=False)
    assert len(rules(Net(lambda m, x: m.f(m.f(x)), f=shared))) == 2

    def walk(m: Any, x: Tensor) -> Tensor:
        for layer in m.f:
            x = layer(x)
        return x

    walked = Net(walk, f=nn.Sequential(conv(4, 4), bn(4), nn.ReLU()))
    theirs = copy.deepcopy(walked.double())
    _, report = replace(walked, example_inputs=image())
    assert report.rows[0].reason == "in the forward of the model"
    steps_alike(walked, theirs, image())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_activations_that_autocast_widens(device: str) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    key = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}[device]
    names = {name.removesuffix("_tanh") for name in activations.ACTIVATIONS}
    widened = {name for name in names if has(f"aten::{name}", key)}
    assert widened == set(WIDENED.get(device, ()))


@pytest.mark.parametrize("add", [False, True])
def test_an_activation_that_autocast_widens_is_apart(
    add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is softplus; on a CPU there is none, so that one stands for it here."""
    monkeypatch.setitem(WIDENED, "cpu", {"softplus"})
    model = Net(
        lambda m, x: F.softplus(m.b(x) + x if add else m.b(x)), b=bn(4), c=conv(4, 4)
    ).double()
    _, report = replace(model)
    assert report.rows[0].decision == "fused"
    asked: list[Any] = []
    run = type(model.b).run
    monkeypatch.setattr(type(model.b), "run", lambda self, *a: asked.append(a[2]) or run(self, *a))
    x = image()
    model(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert asked == ["softplus", None]
