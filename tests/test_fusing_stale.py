"""What a trace read and a later change makes another: the fused forward follows, or steps back."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonnorm
from tritonnorm.fusing.forward import holds


class Block(nn.Module):
    """Fuses its batch norm and activation, then does what `then` says."""

    def __init__(self, then: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.drop, self.extra, self.gain = nn.Dropout(0.0), nn.ModuleList(), nn.ParameterList()
        self.gain.append(nn.Parameter(torch.ones(1)))
        self.then = then

    def body(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.body(x))


def each(block: Any, y: Tensor) -> Tensor:
    for module in block.extra:
        y = module(y)
    return y


CASES: dict[str, tuple[Any, Any]] = {
    "absent": (
        lambda m, y: y * 2 if getattr(m, "double", False) else y,
        lambda m: setattr(m, "double", True),
    ),
    "child": (lambda m, y: y * (1 - m.drop.p), lambda m: setattr(m.drop, "p", 0.5)),
    "list": (each, lambda m: m.extra.append(nn.Tanh())),
    "parameters": (
        lambda m, y: y * sum(m.gain),
        lambda m: m.gain.append(nn.Parameter(torch.ones(1))),
    ),
    "method": (
        lambda m, y: y,
        lambda m: setattr(m, "body", types.MethodType(lambda s, x: s.bn(x), m)),
    ),
    "mode": (lambda m, y: y * 2 if m.bn.training else y, lambda m: m.eval()),
    "gradients": (
        lambda m, y: y * 2 if torch.is_grad_enabled() and not m.training else y,
        lambda m: m.eval(),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("inputs", [True, False])
def test_what_changes_after_replace(name: str, inputs: bool) -> None:
    then, change = CASES[name]
    model = Block(then)
    other = copy.deepcopy(model)
    x = torch.randn(2, 3, 4, 4)
    other, _ = tritonnorm.replace(other, example_inputs=x if inputs else None)
    for _ in range(2):
        torch.testing.assert_close(other(x), model(x))
        for m in (model, other):
            change(m)


class Config:
    """Numbers of a class, as some projects keep their settings."""

    factor = 1.0


class Settings(dict):  # type: ignore[type-arg]
    """A dictionary of another class."""


FACTOR, FACTORS, SETTINGS = 1.0, {"a": [1.0]}, types.SimpleNamespace(factor=1.0)


def double(y: Tensor) -> Tensor:
    return y * 2


class Negative(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


class Globals(Block):
    """Reads what a trace does not see."""

    def __init__(self) -> None:
        super().__init__(lambda m, y: y)
        self.config, self.settings = Config, Settings(factor=1.0)
        self.register_buffer("few", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scaled(self.body(x)) * FACTOR * FACTORS["a"][0] * SETTINGS.factor * Config.factor
        y = y * self.config.factor * self.settings["factor"]
        return double(y) if self.few.shape[0] == 1 else y

    def scaled(self, y: Tensor) -> Tensor:
        return y * 3


class Other(Globals):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


HERE = sys.modules[__name__]
CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "global": lambda m, patch: patch.setattr(HERE, "FACTOR", 2.0),
    "contents": lambda m, patch: patch.setitem(FACTORS, "a", [2.0]),
    "object": lambda m, patch: patch.setattr(SETTINGS, "factor", 2.0),
    "class": lambda m, patch: patch.setattr(Config, "factor", 2.0),
    "dictionary": lambda m, patch: patch.setitem(m.settings, "factor", 2.0),
    "function": lambda m, patch: patch.setattr(HERE, "double", lambda y: y * 4),
    "method": lambda m, patch: patch.setattr(Globals, "scaled", lambda self, y: y * 5),
    "forward": lambda m, patch: patch.setattr(Globals, "forward", lambda self, x: self.body(x)),
    "shape": lambda m, patch: patch.setattr(m, "few", torch.zeros(2)),
    "block": lambda m, patch: patch.setattr(m, "__class__", Other),
    "activation": lambda m, patch: patch.setattr(m.relu, "__class__", Negative),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("pickled", [False, True])
def test_what_no_attribute_shows(name: str, pickled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Globals()
    other, report = tritonnorm.replace(copy.deepcopy(model))
    assert [row.decision for row in report.rows] == ["fused"]
    x = torch.randn(2, 3, 4, 4)
    if pickled:
        model.then = other.then = None
        other = pickle.loads(pickle.dumps(other))
    torch.testing.assert_close(other(x), model(x))
    assert holds(other.forward)
    for m in (model, other):
        CHANGES[name](m, monkeypatch)
    torch.testing.assert_close(other(x), model(x))
    assert not holds(other.forward)


class ByClass(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if type(self) is ByClass and type(x) is Tensor else -y


class ByDict(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return -y if self.__dict__.get("flip") else y


class ByDice(Block):
    def __init__(self) -> None:
        super().__init__(lambda m, y: y)
        self.dice = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.dice.random()


class Tagged(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y.tag = "seen"  # type: ignore[attr-defined]
        return y


class ByDefault(Block):
    def forward(self, x: Tensor, factors: Any = [1.0]) -> Tensor:  # noqa: B006
        return self.body(x) * factors[0]


@pytest.mark.parametrize("kind", [ByClass, ByDict, ByDice, Tagged, ByDefault])
def test_code_that_a_trace_cannot_follow_stays(kind: Any) -> None:
    model = kind() if kind is ByDice else kind(lambda m, y: y)
    other, report = tritonnorm.replace(copy.deepcopy(model))
    assert [row.decision for row in report.rows] == ["replaced"]
    x = torch.randn(2, 3, 4, 4)
    y, expected = other(x), model(x)
    torch.testing.assert_close(y, expected)
    assert y.__dict__ == expected.__dict__


def test_a_parameter_that_becomes_none() -> None:
    model = Block(lambda m, y: y if m.scale is None else y * m.scale)
    model.scale = nn.Parameter(torch.full((1,), 2.0))
    other, _ = tritonnorm.replace(copy.deepcopy(model))
    x = torch.randn(2, 3, 4, 4)
    for _ in range(2):
        torch.testing.assert_close(other(x), model(x))
        other.scale = model.scale = None


def test_a_replace_leaves_nothing_of_its_traces_behind() -> None:
    def then(m: Any, y: Tensor) -> Tensor:
        m.conv.calls = getattr(m.conv, "calls", 0) + 1
        m.bn.eval()
        m.kept.append(y)
        return y

    model = Block(then)
    model.kept = []  # type: ignore[assignment]
    tritonnorm.replace(model, dry_run=True)
    assert model.kept == [] and model.bn.training and not hasattr(model.conv, "calls")


def test_code_that_asks_for_an_attribute_that_no_tensor_has() -> None:
    class Nested(Block):
        def forward(self, x: Any) -> Tensor:
            return self.body(x.tensors if hasattr(x, "tensors") else x)

    model = Nested(lambda m, y: y)
    x = torch.randn(2, 3, 4, 4)
    other, _ = tritonnorm.replace(copy.deepcopy(model))
    torch.testing.assert_close(other(x), model(x))


def test_an_activation_with_a_tensor_for_a_number_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(0.1))
    model[2].negative_slope = torch.tensor(0.1)
    other, report = tritonnorm.replace(copy.deepcopy(model))
    assert report.rows[0].decision == "replaced"
    for m in (model, other):
        m[2].negative_slope.fill_(0.5)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(other(x), model(x))
