"""fold: only pairs whose data flow is proven are folded; everything else is left and says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import tritonnorm
from tests.fold_models import LIMIT, Chain, X, error, rand, reason, trained
from tritonnorm.flow.inputs import tensors_in
from tritonnorm.fold import fold


def test_definition_order_means_nothing() -> None:
    model = trained(Chain(lambda m, x: m.bn(m.conv(x)).relu()))
    for inputs in (None, rand(*X)):
        folded, report = fold(model, inputs)
        assert report.counts == {"folded": 1}, str(report)
        assert error(model, folded, rand(*X)) <= LIMIT
    other = trained(Chain(lambda m, x: m.bn(m.conv(x).relu())))
    assert "relu" in reason(other)
    assert "the shift does not pass through relu" in reason(other, rand(*X))


def _keep(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.kept.append(y)
    return m.bn(y)


def _numpy(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y) * float(y.numpy().max())


def _view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = y.flatten(1)
    return m.bn(y).sum() + z.sum()


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.clamp_(min=1)
    return m.bn(y)


def _own_weight(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight * 2, padding=1)


def _own_statistics(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) + m.bn.running_mean[:, None, None]


TRAPS: dict[str, tuple[Callable[..., Any], str]] = {
    "skip": (lambda m, x: (y := m.conv(x)) + m.bn(y), "also used by add"),
    "returned": (lambda m, x: (m.bn(y := m.conv(x)), y), "output"),
    "relu between": (lambda m, x: m.bn(m.conv(x).relu()), "follows relu|through relu"),
    "kept": (_keep, "kept"),
    "numpy": (_numpy, "numpy"),
    "view": (_view, "also used by"),
    "in place": (_in_place, "clamp"),
    "bn only": (lambda m, x: m.bn(x.repeat(1, 2, 1, 1)[:, :4]), "in several ways|follows getitem"),
    "bn twice": (lambda m, x: m.bn(m.bn(m.conv(x))), "also called without|more than once"),
    "conv twice": (lambda m, x: m.bn(m.conv(x)) + m.conv(x), "without the batch norm|once"),
    "bn unused": (lambda m, x: m.conv(x), "not executed|not called"),
    "weight read": (_own_weight, "read outside"),
    "statistics read": (_own_statistics, "read outside"),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str, traced: bool) -> None:
    """What the data flow forbids is left, by the recording and by the trace, and stays right."""
    forward, words = TRAPS[name]
    model = trained(Chain(forward))
    folded, report = fold(model, None if traced else rand(*X), verify=False)
    assert report.counts == {"left": 1}, str(report)
    if not (traced and name == "numpy"):  # that one cannot be traced at all
        assert any(word in report.rows[0].reason for word in words.split("|")), str(report)
    model.kept.clear()
    with torch.no_grad():
        for a, b in zip(tensors_in(model(rand(*X))), tensors_in(folded(rand(*X))), strict=True):
            assert torch.equal(a, b)


def test_linear_on_sequences_does_not_fold() -> None:
    """(N, C, L): the batch norm acts on axis 1, the layer on axis 2; both have 4 channels."""
    model = trained(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    assert "its output is (3, 4, 4)" in reason(model, rand(3, 4, 5))
    assert "give example_inputs" in reason(model)
    folded, report = fold(model, rand(3, 5))
    assert report.counts == {"folded": 1} and error(model, folded, rand(3, 5)) <= LIMIT
    # valid on one input only: every input has to agree
    assert "its output is" in reason(model, [rand(3, 5), rand(3, 4, 5)])


def test_unbatched_convolution_does_not_fold() -> None:
    model = trained(nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4)))
    assert "its output is (4, 4)" in reason(model, rand(3, 4))


def test_shared_layers_and_tied_weights() -> None:
    two = trained(Chain(lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv(2 * x)), bn2=nn.BatchNorm2d(4)))
    _, report = fold(two, verify=False)
    assert report.counts == {"left": 2}, str(report)
    folded, report = fold(two, rand(*X), verify=False)
    assert report.counts == {"folded": 2} and error(two, folded, rand(*X)) <= LIMIT
    assert {row.rule for row in report.rows} == {"shared conv2d -> bn"}
    assert f"{4 * 3 * 9 * 8} bytes more" in report.notes[0]
    assert (type(folded.conv), type(folded.bn)) == (nn.Identity, nn.Conv2d)
    tied = trained(
        Chain(
            lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv2(x)),
            bn2=nn.BatchNorm2d(4),
            conv2=nn.Conv2d(3, 4, 3, padding=1),
        )
    )
    tied.conv2.weight = tied.conv.weight
    for inputs in (None, rand(*X)):
        folded, report = fold(tied, inputs, verify=False)
        assert report.counts == {"folded": 2} and error(tied, folded, rand(*X)) <= LIMIT
        assert "bytes more" in report.notes[0]
    # one block called twice is fine: every call is the same pair
    block = trained(Chain(lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(2 * x))))
    folded, report = fold(block, rand(*X))
    assert report.counts == {"folded": 1} and error(block, folded, rand(*X)) <= LIMIT


def test_shared_batch_norm_is_replaced_under_all_its_names() -> None:
    model = Chain(lambda m, x: m.other(m.conv(x)))
    model.other = model.bn
    trained(model)
    folded, report = fold(model, rand(*X))
    assert report.counts == {"folded": 1}
    assert type(folded.bn) is nn.Identity and folded.other is folded.bn
    assert error(model, folded, rand(*X)) <= LIMIT


class Odd(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).abs()


class OddBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).abs()


def _change(name: str) -> nn.Module:
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    if name == "conv subclass":
        conv = Odd(3, 4, 3)
    if name == "bn subclass":
        bn = OddBatchNorm(4)
    if name == "no statistics":
        bn = nn.BatchNorm2d(4, track_running_stats=False)
    model = trained(nn.Sequential(conv, bn))
    if name == "training":
        bn.train()
    if name == "conv hook":
        conv.register_forward_hook(lambda *_: None)
    if name == "bn hook":
        bn.register_forward_pre_hook(lambda *_: None)
    if name == "backward hook":
        bn.register_full_backward_hook(lambda *_: None)
    if name == "gradient hook":
        conv.weight.register_hook(lambda g: g)
    if name == "spectral norm":
        parametrizations.spectral_norm(conv)
    if name == "bn parametrised":
        parametrize.register_parametrization(bn, "weight", nn.Softplus())
    if name == "patched":
        conv.forward = lambda x: F.relu(nn.Conv2d.forward(conv, x))  # type: ignore[method-assign]
    if name == "compiled":
        bn.compile(backend="eager")
    if name == "negative":
        bn.running_var[2] = -1
    if name == "nan":
        bn.running_mean[1] = float("nan")
    if name == "own statistics":
        model[1] = OwnStatisticsBatchNorm2d(4).double()
    if name == "subclass tensor":
        conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Sharded))
    return model


class Sharded(Tensor):
    pass


class OwnStatisticsBatchNorm2d(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] / x.std()


LEFT = {
    "conv subclass": "follows abs|through abs|follows a Odd|follows an Odd|OddConv",
    "bn subclass": "not a class known to be plain|goes on with abs",
    "no statistics": "statistics",
    "training": "training mode",
    "conv hook": "has a hook",
    "bn hook": "has a hook",
    "backward hook": "has a hook",
    "gradient hook": "gradient hook",
    "spectral norm": "parametrised|follows",
    "bn parametrised": "parametrised",
    "patched": "patched or compiled",
    "compiled": "compiled",
    "negative": "running_var is negative (channel 2)",
    "nan": "running_mean is not finite (channel 1)",
    "own statistics": "not a class known to be plain|it goes on with",
    "subclass tensor": "Sharded, not a plain tensor",
}


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", LEFT)
def test_left_with_its_reason(name: str, recorded: bool) -> None:
    """One odd pair is left and named; the good pair beside it still folds."""
    odd = _change(name)
    good = trained(nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)))
    model = nn.Sequential(odd, good, nn.Tanh())
    odd.append(nn.Softsign())  # which does not fold, and is not fused either
    folded, report = fold(model, rand(*X) if recorded else None, inplace=True)
    assert [row.decision for row in report.rows] == ["left", "folded"], str(report)
    assert any(words in report.rows[0].reason for words in LEFT[name].split("|")), str(report)
    assert folded is model and type(model[1][1]) is nn.Identity


def test_lazy_scripted_and_compiled() -> None:
    assert "lazy" in reason(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()).eval())
    plain = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    compiled = torch.compile(plain, backend="eager")
    assert "fold before torch.compile" in reason(compiled)
    inner = nn.Sequential(torch.compile(plain, backend="eager"))
    assert "fold before torch.compile" in reason(inner, rand(*X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted() -> None:
    plain = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert "fold before scripting" in reason(torch.jit.script(plain))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_residual_stays(activation: str | None) -> None:
    model = trained(
        Chain(
            lambda m, x: m.ours(m.conv(x), x[:, :1] + m.conv2(x)),
            ours=tritonnorm.BatchNorm2d(4, activation=activation),
            conv2=nn.Conv2d(3, 4, 3, padding=1),
        )
    )
    del model.bn
    assert "more than one input" in reason(model)
    folded, report = fold(model, rand(*X))
    assert report.counts == {"folded": 1} and error(model, folded, rand(*X)) <= LIMIT


def test_container_hooks_forbid_the_trace_but_not_the_recording() -> None:
    model = trained(nn.Sequential(Chain(lambda m, x: m.bn(m.conv(x)))))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda m, a, y: seen.append(y.mean()))
    assert "has a hook" in reason(model)
    folded, report = fold(model, rand(*X))
    assert report.counts == {"folded": 1} and error(model, folded, rand(*X)) <= LIMIT


def test_optional_arguments_must_not_change_the_flow() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            y = self.conv(x)
            if more is None:
                return self.bn(y) + y
            return self.bn(y) + more

    assert "also used by add" in reason(trained(Optional()))


STEPS = ("conv", "transpose", "bn", "relu", "identity", "skip", "twice")


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.sampled_from(STEPS), min_size=2, max_size=7), traced=st.booleans())
def test_random_graphs(steps: list[str], traced: bool) -> None:
    """Random chains, some with values used twice: folded or not, the output stays the same."""

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            makers = {
                "conv": lambda: nn.Conv2d(4, 4, 1, groups=2),
                "transpose": lambda: nn.ConvTranspose2d(4, 4, 1, groups=2),
                "bn": lambda: nn.BatchNorm2d(4),
                "relu": nn.ReLU,
                "identity": nn.Identity,
            }
            self.steps = nn.ModuleList(makers.get(step, nn.Identity)() for step in steps)

        def forward(self, x: Tensor) -> Tensor:
            before = x
            for step, module in zip(steps, self.steps, strict=True):
                if step == "skip":
                    x = x + before
                elif step == "twice":
                    before = x
                else:
                    x = module(x)
            return x

    model, x = trained(Random()), rand(2, 4, 2, 2)
    folded, report = fold(model, None if traced else x, verify=False)
    assert len(report.rows) == steps.count("bn")
    assert error(model, folded, x) <= LIMIT
    chain = [step for step in steps if step != "identity"]
    certain = _neighbours(chain)
    folds = report.counts.get("folded", 0)
    assert certain <= folds
    if traced:  # a value that was remembered need not have been used again
        assert folds <= _neighbours([step for step in chain if step != "twice"])


def _neighbours(chain: list[str]) -> int:
    return sum(a in ("conv", "transpose") and b == "bn" for a, b in itertools.pairwise(chain))
