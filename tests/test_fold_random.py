"""fold on random graphs made of what folds and of what does not: the output stays the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tritonnorm
from tests.fold_models import LIMIT, bn, conv, positive, rand, trained
from tritonnorm.fold import fold
from tritonnorm.fold.rules import RULES

SHAPE = (2, 4, 6, 6)  # of every value, so that any step can follow any other

# What a step makes of one module list and one or two values.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: conv(4, 4),
    "conv, no bias": lambda: conv(4, 4, 1, bias=False),
    "grouped": lambda: conv(4, 4, groups=2, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
    "bn": lambda: bn(4),
    "bn without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "ours": lambda: tritonnorm.BatchNorm2d(4, activation="relu"),
    "relu": lambda: nn.ReLU(inplace=True),
    "prelu": lambda: nn.PReLU(4),
    "identity": lambda: nn.Identity(),
}


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(2, 1)


def _shuffle(x: Tensor) -> Tensor:
    return x.view(2, 2, 2, 6, 6).transpose(1, 2).reshape(SHAPE)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "add in place": lambda x, y: x.add_(y),
    "subtract": lambda x, y: x - 2 * y,
    "multiply": lambda x, y: x * y,
    "gate": lambda x, y: x * y.mean((2, 3), keepdim=True).sigmoid(),
    "number": lambda x, y: (x * 3 + 0.5) / 2,
    "cat": lambda x, y: torch.cat([x[:, :2], y[:, 2:]], 1),
    "halves": lambda x, y: torch.cat([_halves(x)[1], _halves(y)[0]], 1),
    "slice in place": lambda x, y: x.index_add_(1, torch.tensor([1]), y[:, :1]),
    "shuffle": lambda x, y: _shuffle(x),
    "select": lambda x, y: x[:, torch.tensor([3, 1, 0, 2])],
    "flat": lambda x, y: x.flatten(1).reshape(SHAPE),
    "permute": lambda x, y: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "max pool": lambda x, y: F.max_pool2d(x, 3, 1, 1),
    "average": lambda x, y: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "average of zeros": lambda x, y: F.avg_pool2d(x, 3, 1, 1),
    "half size": lambda x, y: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear"),
    "pixels": lambda x, y: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "pad": lambda x, y: F.pad(x, (1, 0, 0, 1))[:, :, 1:, :-1],
    "repeat": lambda x, y: x[:, :1].expand(-1, 4, -1, -1),
    "leaky": lambda x, y: F.leaky_relu(x, 0.2),
    "relu6": lambda x, y: F.relu6(x),
    "tanh": lambda x, y: x.tanh(),
    "noise": lambda x, y: x + torch.linspace(0, 1, 6, dtype=x.dtype),
}
STEPS = st.tuples(
    # layers and batch norms are what this is about: they come as often as all else together
    st.one_of(st.sampled_from(list(LAYERS)), st.sampled_from(list(FUNCTIONS))),
    st.integers(0, 2),  # the value it works on, counted from the last
    st.integers(0, 3),  # the second value
    st.booleans(),  # use the module of an earlier step of the same kind again
)


class Random(nn.Module):
    """A straight-line program over values of one shape."""

    def __init__(self, steps: list[tuple[str, int, int, bool]], outputs: int) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        self.parts = nn.ModuleList()
        self.which: list[int] = []
        made: dict[str, int] = {}
        for kind, _, _, again in steps:
            if kind in LAYERS and not (again and kind in made):
                made[kind] = len(self.parts)
                self.parts.append(LAYERS[kind]())
            self.which.append(made.get(kind, -1))

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for (kind, first, second, _), which in zip(self.steps, self.which, strict=True):
            a, b = (values[-1 - min(k, len(values) - 1)] for k in (first, second))
            values.append(FUNCTIONS[kind](a, b) if which < 0 else self.parts[which](a))
        return tuple(values[-self.outputs :])


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=2, max_size=9),
    outputs=st.integers(1, 2),
    above_zero=st.booleans(),
    seed=st.integers(0, 3),
)
def test_random_graphs(
    steps: list[tuple[str, int, int, bool]], outputs: int, above_zero: bool, seed: int
) -> None:
    """Without any check of its own, so that only the proof of the data flow is relied on."""
    torch.manual_seed(seed)
    model = trained(Random(steps, outputs), seed)
    if above_zero:
        positive(model)
    x = rand(*SHAPE)
    try:
        with torch.no_grad():
            expected = model(x.clone())
    except RuntimeError as error:  # no program: it writes into what `expand` made
        assert "more than one element of the written-to tensor" in str(error)
        reject()
    if not all(torch.isfinite(t).all() and t.abs().max() > 0 for t in expected):
        return
    with mock.patch.dict(os.environ, TRITONNORM_DISABLE="1"):  # interpreted kernels take long
        _compare(model, x)


def _compare(model: nn.Module, x: Tensor) -> None:
    folded, report = fold(model, x, verify=False)
    assert torch.equal(x, rand(*SHAPE))
    for given_ in (x, 3 * torch.randn(SHAPE, dtype=torch.float64)):
        with torch.no_grad():
            pairs = zip(model(given_.clone()), folded(given_.clone()), strict=True)
            for a, b in pairs:
                worst = float((a - b).abs().max() / a.abs().max().clamp(min=1e-300))
                assert worst <= LIMIT, f"{worst}\n{report}"


def test_every_rule_can_come_up() -> None:
    """The random steps know every operation that has a rule, by one of its variants."""
    seen: set[str] = set()
    torch.manual_seed(0)
    for kind in FUNCTIONS:
        steps = [("conv", 0, 0, False), (kind, 0, 0, False), ("bn", 0, 0, False)]
        model = trained(Random(steps, 1))
        _, report = fold(model, rand(*SHAPE), verify=False)
        seen |= set(report.rows[0].rule.split(" -> "))
    through = {name for name in seen if name in RULES}
    assert {"add", "mul", "div", "cat", "view", "permute", "slice", "avg_pool2d"} <= through, seen
