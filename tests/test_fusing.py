"""replace fuses a batch norm with what follows it, wherever the code of a model shows that."""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold_models import Net, bn, conv
from tritonnorm.fusing import verify
from tritonnorm.fusing.forward import FusedForward, holds
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
]


@pytest.mark.parametrize(("name", "run"), ACTIVATIONS)
def test_activations(name: str, run: Callable[..., Tensor]) -> None:
    model = Net(run, b=bn(4), c=conv(4, 4), a=nn.ReLU(inplace=True), same=nn.Identity())
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


def twice(m: Any, x: Tensor) -> Tensor:
    return m.b(m.b(x).relu()).relu()


def sets(m: Any, x: Tensor) -> Tensor:
    m.seen = m.b(x)
    return m.seen.relu()


def appends(m: Any, x: Tensor) -> Tensor:
    y = m.b(x)
    m.kept.append(0)
    return y.relu()


STORE: list[Any] = []


def keeps(m: Any, x: Tensor) -> Tensor:
    STORE[:] = [m.b(x)]
    return STORE[0].relu()


def dice(m: Any, x: Tensor) -> Tensor:
    return m.b(x).relu() * (random.random() < 2)


def noise(m: Any, x: Tensor) -> Tensor:
    return m.b(x).relu() + torch.zeros(1).double()


def frozen(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.c(x)
    return m.b(y).relu()


def lowered(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = m.c(x)
    return m.b(y).relu()


def raised(m: Any, x: Tensor) -> Tensor:
    return m.b(m.c(x)).relu() if torch.is_autocast_enabled("cpu") else m.b(m.c(x)).tanh()


def overwrites(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    z = y
    y += m.b(m.c(x))
    return z.relu()


def late_write(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    z = m.b(y)
    y.mul_(2.0)
    return F.relu(z + y)


def gate_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.b(x)
    return y * torch.sigmoid_(y)


LEFT: list[tuple[str, Any]] = [
    ("relu and tanh", lambda m, x: _two(m, x)),
    ("more than once", twice),
    ("sets attributes", sets),
    ("a list", appends),
    ("keeps a value", keeps),
    ("random", dice),
    ("no traced value", noise),
    ("set_grad_enabled", frozen),
    ("autocast", lowered),
    ("autocast", raised),
    ("overwrites", overwrites),
    ("could change", late_write),
    ("added to itself", lambda m, x: _twofold(m, x)),
    ("goes to the result", lambda m, x: m.b(x)),
    ("goes to c", lambda m, x: m.c(m.b(x)).relu()),
    ("learned", lambda m, x: m.p(m.b(x))),
    ("no tensor", lambda m, x: m.b(x) + 1.0),
    ("sigmoid_ and mul", gate_in_place),
    ("goes to clamp", lambda m, x: m.b(x).clamp(0.0, 1.0)),
    ("goes to hardtanh", lambda m, x: F.hardtanh(m.b(x))),
    ("goes to add", lambda m, x: torch.add(m.b(x), x, alpha=2)),
]


def _two(m: Any, x: Tensor) -> Tensor:
    y = m.b(x)
    return y.relu() + y.tanh()


def _twofold(m: Any, x: Tensor) -> Tensor:
    y = m.b(x)
    return y + y


@pytest.mark.parametrize(("reason", "run"), LEFT)
def test_what_is_not_fused(reason: str, run: Callable[..., Tensor]) -> None:
    model = Net(run, b=bn(4), c=conv(4, 4), p=nn.PReLU())
    model.kept = []
    if run in (gate_in_place, late_write):  # they cannot be differentiated
        _, report = replace(model.double())
        assert reason in report.rows[0].reason and report.counts == {"replaced": 1}
        return
    assert reason in why(model)


def test_broadcast_and_promoted_additions_run_as_they_are_written() -> None:
    model = Net(
        lambda m, x: F.relu(m.b(m.c(x)) + x.mean((2, 3), keepdim=True)), b=bn(4), c=conv(4, 4)
    )
    theirs = copy.deepcopy(model.double())
    replace(model)
    steps_alike(model, theirs, image())
    low = Net(inplace_add, b=bn(4), c=conv(4, 4), a=nn.ReLU())
    low_theirs = copy.deepcopy(low)
    replace(low)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = low(image().float()), low_theirs(image().float())
    assert y.dtype == z.dtype == torch.bfloat16


def test_code_that_depends_on_the_mode() -> None:
    model = Net(
        lambda m, x: F.dropout(F.relu(m.b(x)), 0.5, m.training) + m.i(x),
        b=bn(4),
        i=nn.Identity(),
    )
    assert rules(model, example_inputs=image()) == {"b": "bn -> relu"}
    assert len(set(model.forward.sources.values())) == 2


def test_arguments() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = bn(4)

        def forward(self, x: Tensor, extra: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
            y = self.b(x).relu() * scale
            return y if extra is None else y + extra

    model = Optional().double().eval()
    theirs = copy.deepcopy(model)
    replace(model)
    x = image()
    for args, kwargs in (((x,), {}), ((x, x), {}), ((), {"x": x}), ((x,), {"scale": 2.0})):
        assert torch.equal(model(*args, **kwargs), theirs(*args, **kwargs))
    with pytest.raises(TypeError):
        model(x, wrong=1)
    given = Optional().double()
    _, report = replace(given, example_inputs={"x": x, "extra": x, "scale": 2.0})
    assert report.counts == {"fused": 1}
    assert given.forward.names == ("x", "extra") and given.forward.given == ("scale",)
    assert given.forward.tensors((x, x), {"scale": 2.0}) == [x, x]
    assert given.forward.tensors((x, x), {}) is None  # the default is another value


def watched() -> tuple[Net, Net]:
    model = Net(lambda m, x: m.a(m.b(x)) * m.factor, b=bn(4), a=nn.LeakyReLU(0.1)).double()
    model.factor = 2
    theirs = copy.deepcopy(model)
    replace(model)
    assert holds(model.forward)
    return model, theirs


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "factor", 3),
        lambda m: setattr(m.a, "negative_slope", 0.5),
        lambda m: setattr(m, "a", nn.Tanh()),
        lambda m: setattr(m, "b", nn.Identity()),
        lambda m: m.a.register_forward_hook(lambda *_: torch.ones(1, dtype=torch.float64)),
        lambda m: m.b.register_forward_hook(lambda *_: _[2] * 2),
        lambda m: m.a.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        lambda m: setattr(m.a, "forward", torch.tanh),
    ],
)
def test_what_changes_later_is_seen(change: Callable[[nn.Module], object]) -> None:
    model, theirs = watched()
    change(model), change(theirs)
    x = image()
    assert torch.equal(model(x), theirs(x))
    assert not holds(model.forward)


def test_hooks_at_the_time_forbid_it() -> None:
    for name in ("b", "a"):
        model = Net(lambda m, x: m.a(m.b(x)), b=bn(4), a=nn.ReLU())
        getattr(model, name).register_forward_hook(lambda *_: None)
        assert "hook" in why(model)
    model = Net(lambda m, x: m.a(m.b(x)), b=bn(4), a=nn.ReLU())
    model.register_forward_hook(lambda *_: None)  # of the block itself: it is called as ever
    assert len(rules(model)) == 1


def test_a_block_that_computes_something_else_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonnorm.fusing import match

    monkeypatch.setitem(match.FUNCTIONS, torch.tanh, "sigmoid")
    model = Net(lambda m, x: torch.tanh(m.b(x)), b=bn(4))
    assert "differs by" in why(model, example_inputs=image())
    assert "forward" not in model.__dict__


def test_a_model_that_cannot_run_is_left_as_it_was() -> None:
    model = block()
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match="example_inputs: expected inputs the model can run on"):
        replace(model, example_inputs=torch.zeros(2, 3))
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before


def test_a_run_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block().train()
    state, x = copy.deepcopy(model.state_dict()), image().float()
    random_state = torch.get_rng_state()
    replace(model, example_inputs=x)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(torch.get_rng_state(), random_state) and model.training
    monkeypatch.setattr(FusedForward, "install", lambda self: 1 / 0)
    other = block()
    with pytest.raises(ZeroDivisionError):
        replace(other)
    assert type(other.b) is nn.BatchNorm2d and "forward" not in other.__dict__


def test_lazy_and_meta_models_are_not_run() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), bn(4), nn.ReLU())
    _, report = replace(lazy, example_inputs=image())
    assert "lazy" in report.notes[0] and report.counts == {"fused": 1}
    with torch.device("meta"):
        model = nn.Sequential(conv(4, 4), bn(4), nn.ReLU())
    _, report = replace(model, example_inputs=image())
    assert "meta" in report.notes[0] and report.counts == {"fused": 1}


def test_the_check_sees_statistics_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonnorm.nn import BatchNorm2d

    run = BatchNorm2d.run

    def stale(self: Any, x: Tensor, *rest: Any) -> Tensor:
        y = run(self, x, *rest)
        if self.training:
            self.num_batches_tracked.add_(1)
        return y

    monkeypatch.setattr(BatchNorm2d, "run", stale)
    model = Net(lambda m, x: m.b(x).relu(), b=bn(4))
    _, report = replace(model, example_inputs=image().float())
    assert "a buffer differs" in report.rows[0].reason
    monkeypatch.setattr(
        BatchNorm2d, "run", lambda self, x, *rest: run(self, x.detach() + 0 * x, *rest)
    )
    _, report = replace(Net(lambda m, x: m.b(x).relu(), b=bn(4)), example_inputs=image().float())
    assert "a gradient differs" in report.rows[0].reason
    assert verify.LIMIT == 1e-9
