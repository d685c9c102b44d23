"""Every operator is seen without running it: what is explained is what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonnorm
from bench.lab.traffic import trace
from tests import tuned
from tritonnorm.device import KNOWN, simulated
from tritonnorm.explanation import explain
from tritonnorm.observe import OperatorCall, observe
from tritonnorm.plan import Untuned
from tritonnorm.tune import standing

H200 = KNOWN["h200"]


pytestmark = pytest.mark.usefixtures("cache")


class Sequences(nn.Module):
    """A masked batch norm whose lengths are part of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bn = tritonnorm.MaskedBatchNorm1d(6, **options)
        self.register_buffer("lengths", torch.tensor([3, 0, 9, 5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x, lengths=self.lengths)


class Residual(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, residual=x)


MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "batch": (Residual(tritonnorm.BatchNorm2d(6, activation="relu")), (4, 6, 5, 5)),
    "group": (Residual(tritonnorm.GroupNorm(2, 6, activation="silu")), (4, 6, 5, 5)),
    "instance": (tritonnorm.InstanceNorm2d(6, affine=True), (4, 6, 5, 5)),
    "layer": (tritonnorm.LayerNorm(40), (4, 7, 40)),
    "rms": (Residual(tritonnorm.RMSNorm(40, activation="gelu")), (4, 7, 40)),
    "masked": (Sequences(activation="relu"), (4, 6, 9)),
    "masked, cumulative": (Sequences(momentum=None, layout="NLC"), (4, 9, 6)),
}


def rehearsed(calls: list[OperatorCall]) -> list[str]:
    return [launch.parts("cuda")[0].fn.__name__ for call in calls for launch, _ in call.rehearse()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_rehearsed_is_what_runs(name: str, channels_last: bool) -> None:
    """Kernel by kernel, forward and backward, in the order of the launches."""
    model, shape = MODELS[name]
    x = torch.randn(shape)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with simulated(H200):
        for training in (True, False):
            model.train(training)
            calls = observe(model, x, modes=("present",))
            assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
            explained = {e.problem for e in explain(model, x)}
            assert explained == {p for call in calls for p, _ in call.problems}
            with trace() as seen:
                model(x).sum().backward()
            assert [launch.kernel for launch in seen.launches] == rehearsed(calls)
            before = {n: t.clone() for n, t in model.state_dict().items()}


def test_calls_that_are_alike_count_once() -> None:
    norms = [tritonnorm.GroupNorm(2, 8, eps=e) for e in (1e-5, 1e-5, 1e-3)]
    model = nn.Sequential(*norms, tritonnorm.GroupNorm(4, 8))
    with simulated(H200):
        calls = observe(model, torch.randn(2, 8, 4, 4, requires_grad=True))
    assert [call.name for call in calls] == [
        *("group_norm", "group_norm", "group_norm_backward", "group_norm_backward"),
    ]
    assert [p.groups for call in calls for p, _ in call.problems] == [2, 4, 4, 2]


def test_a_tuned_result_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group norm and of sequences; without a result strict is no matter for observers."""
    for name, algorithm in (("group", "group_split"), ("masked", "masked")):
        model, shape = MODELS[name]
        x = torch.randn(shape)
        monkeypatch.setenv("TRITONNORM_STRICT", "1")
        with simulated(H200):
            first = explain(model.train(), x)[0]
            assert first.plan.source == "formula" and first.problem.direction == "forward"
            with pytest.raises(Untuned):
                model(x)
            standing.put(tuned.entry(first.problem, algorithm))
            found = explain(model, x)[0].plan
            assert (found.algorithm, found.source) == (algorithm, "user cache")
            assert found.config == tuned.last(first.problem, algorithm)
        monkeypatch.delenv("TRITONNORM_STRICT")
