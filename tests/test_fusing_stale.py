"""What a trace read and a later change makes another: the fused forward follows, or steps back."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonnorm


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
