"""What a run or a trace shows and does not prove: nothing is folded on it, or it stays right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fold_models import SHAPE, Net, bn, conv, folded, left, net, rand, same, trained


class Two(Net):
    """A forward with a second argument."""

    def forward(self, x: Tensor, other: Any) -> Any:
        return self.run(self, x, other)


# numbers


def test_a_number_that_is_an_argument() -> None:
    model = net(lambda m, x, a: m.bn(m.conv(x) * a), Two)
    x = rand(SHAPE)
    other, report = folded(model, (x, 0.5))
    assert "an argument of the model" in left(report)
    same(model, other, (x, 0.5), (x, 2.0))


def test_a_number_that_is_an_argument_with_a_default() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, a: float = 1.5) -> Any:
            return self.bn(self.conv(x) * a)

    model = net(None, Scaled)
    x = rand(SHAPE)
    other, report = folded(model, x)
    assert "an argument of the model" in left(report)
    same(model, other, (x,), (x, 2.0))


@pytest.mark.parametrize(
    "number",
    [
        lambda x: x.abs().max().item(),
        lambda x: torch.tensor(float(x.std())),
        lambda x: torch.full((), float(x.std())),
        lambda x: x.flatten()[:1].tolist()[0],
    ],
)
def test_a_number_that_is_read_from_a_tensor(number: Any) -> None:
    model = net(lambda m, x: m.bn(m.conv(x) / number(x)))
    x = rand(SHAPE)
    other, report = folded(model, x)
    assert left(report)
    same(model, other, (x,), (x * 3,))


def test_a_number_of_the_code_is_a_constant_still() -> None:
    """Also beside a condition on the data, which is no number."""

    def run(m: Any, x: Tensor) -> Tensor:
        assert bool(torch.isfinite(x).all())
        return m.bn(m.conv(x) * 0.5 + torch.tensor(2.0))

    model = net(run)
    x = rand(SHAPE)
    other, report = folded(model, x)
    assert report.counts == {"folded": 1}
    same(model, other, (x,), (x * 3,))


def test_a_constant_added_no_times() -> None:
    model = net(lambda m, x: m.bn(torch.add(m.conv(x), 3.0, alpha=0)))
    x = rand(SHAPE)
    other, _ = folded(model, x)
    same(model, other, (x,))


# state


class Counting(nn.Module):
    """Adds how often it was called, which it keeps in a buffer or an attribute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.how, self.calls = conv(4, 4), bn(4), how, 0
        self.register_buffer("step", torch.zeros(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if self.how == "before":
            self.step += 1
        y = self.bn(h + (self.calls if self.how == "attribute" else self.step))
        self.calls += self.how == "attribute"
        if self.how == "after":
            self.step.add_(1)
        if self.how == "other":
            self.step = self.step + 1
        return y


@pytest.mark.parametrize("how", ["before", "after", "other", "attribute"])
def test_state_that_the_forward_changes(how: str) -> None:
    model = trained(Counting(how))
    x = rand(SHAPE)
    other, _ = folded(model, x)
    same(model, other, (x,), (x,), (x,))


@pytest.mark.parametrize(
    "write",
    [lambda kept, h: kept.copy_(h), lambda kept, h: kept.__setitem__(torch.tensor([0, 1]), h)],
)
def test_a_value_that_is_written_into_a_tensor_of_the_caller(write: Any) -> None:
    def run(m: Any, x: Tensor, kept: Tensor) -> Tensor:
        h = m.conv(x)
        write(kept, h)
        return m.bn(h)

    model = net(run, Two)
    x = rand(SHAPE)
    mine, theirs = torch.zeros_like(x), torch.zeros_like(x)
    other, report = folded(model, (x, mine.clone()))
    assert left(report)
    with torch.no_grad():
        model(x, mine)
        other(x, theirs)
    assert mine.any() and torch.equal(mine, theirs)


# modules


def test_a_shared_activation_in_a_sequential() -> None:
    relu = nn.ReLU()
    layers = [conv(4, 4), relu, conv(4, 4), relu, conv(4, 4), relu, conv(4, 4), bn(4), conv(4, 4)]
    layers.append(nn.Flatten())
    model = trained(nn.Sequential(*layers))
    other, report = folded(model)
    assert report.rows[0].partner == "6"
    same(model, other, (rand(SHAPE),))


class Listed(nn.Module):
    """Calls its modules by a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(4, 4), bn(4)
        self.steps = {"all": [self.conv, self.bn]}

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps["all"]:
            x = step(x)
        return x


@pytest.mark.parametrize("inputs", [True, False])
def test_a_batch_norm_in_a_list(inputs: bool) -> None:
    model = trained(Listed())
    x = rand(SHAPE)
    other, report = folded(model, x if inputs else None)
    assert "held by steps" in left(report)
    same(model, other, (x,))


class Tied(nn.Module):
    """Uses the weight of a convolution elsewhere in the model."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = [of]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.of[0].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", [True, False])
def test_a_layer_whose_weight_another_module_uses(inputs: bool) -> None:
    first = conv(4, 4)
    model = trained(nn.Sequential(first, bn(4), nn.ReLU(), Tied(first)))
    x = rand(SHAPE)
    other, report = folded(model, x if inputs else None)
    assert report.counts.get("folded") is None
    same(model, other, (x,))


@pytest.mark.parametrize("inputs", [True, False])
def test_a_layer_that_is_called_with_another_weight(inputs: bool) -> None:
    class Called(Net):
        def __init__(self) -> None:
            super().__init__(None, conv=conv(4, 4), bn=bn(4))
            self.w = nn.Parameter(rand((4, 4, 3, 3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(torch.func.functional_call(self.conv, {"weight": self.w}, (x,)))

    model = trained(Called())
    x = rand(SHAPE)
    other, _ = folded(model, x if inputs else None)
    same(model, other, (x,))


@pytest.mark.parametrize(
    "looks",
    [
        lambda m: m.bn.num_features,
        lambda m: 1 if isinstance(m.bn, nn.BatchNorm2d) else 2,
        lambda m: 1 if m.conv.bias is None else 2,
    ],
)
def test_without_inputs_a_forward_that_looks_at_its_modules(looks: Any) -> None:
    model = net(lambda m, x: m.bn(m.conv(x)) * looks(m), conv=conv(4, 4, bias=False))
    other, report = folded(model)
    assert "give example_inputs" in left(report)
    same(model, other, (rand(SHAPE),))
