"""What replace does not fuse, and what a fused block notices later."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.fold_models import Net, bn, conv
from tests.test_fusing import block, image, inplace_add, rules, steps_alike, why
from tritonnorm.fusing import verify
from tritonnorm.fusing.forward import FusedForward, holds
from tritonnorm.replace import replace


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")


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


def numpys_dice(m: Any, x: Tensor) -> Tensor:
    return m.b(x).relu() * (np.random.rand() < 2)


class Wrapped(OrderedDict):  # type: ignore[type-arg]
    """A mapping of the model's own."""


def wraps(m: Any, x: Tensor) -> Any:
    return Wrapped(y=m.b(x).relu())


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


def parametrized() -> nn.Module:
    found = nn.PReLU()
    parametrize.register_parametrization(found, "weight", nn.Softplus())
    return found


LEFT: list[tuple[str, Any]] = [
    ("relu and tanh", lambda m, x: _two(m, x)),
    ("more than once", twice),
    ("sets attributes", sets),
    ("a list", appends),
    ("keeps a value", keeps),
    ("random", dice),
    ("random", numpys_dice),
    ("no traced value", noise),
    ("set_grad_enabled", frozen),
    ("autocast", lowered),
    ("autocast", raised),
    ("overwrites", overwrites),
    ("could change", late_write),
    ("added to itself", lambda m, x: _twofold(m, x)),
    ("goes to the result", lambda m, x: m.b(x)),
    ("goes to c", lambda m, x: m.c(m.b(x)).relu()),
    ("another class", lambda m, x: m.p(m.b(x))),
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
    model = Net(run, b=bn(4), c=conv(4, 4), p=parametrized())
    model.kept = []
    if run in (gate_in_place, late_write):  # they cannot be differentiated
        _, report = replace(model.double())
        assert reason in report.rows[0].reason and report.counts == {"replaced": 1}
        return
    assert reason in why(model)


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """As transformers returns: a dataclass that is a mapping, too."""

    y: Tensor
    more: Tensor | None = None

    def __post_init__(self) -> None:
        self["y"] = self.y


def test_what_a_block_returns_is_of_its_type() -> None:
    model = Net(wraps, b=bn(4))
    _, report = replace(model)
    assert "makes a Wrapped" in report.rows[0].reason
    model = Net(lambda m, x: Output(m.a(m.b(x))), b=bn(4), a=nn.ReLU())
    theirs = copy.deepcopy(model)
    _, report = replace(model)
    assert report.counts == {"fused": 1}
    x = torch.randn(2, 4, 5, 5)
    assert type(model(x)) is Output and torch.equal(model(x)["y"], theirs(x).y)


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
    from tritonnorm.fusing import activations

    monkeypatch.setitem(activations.FUNCTIONS, torch.tanh, "sigmoid")
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
