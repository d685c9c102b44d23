"""fold: what stays of a batch norm runs with its activation in one launch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonnorm
from tests.fold_models import LIMIT, Net, bn, conv, error, positive, rand, trained
from tritonnorm.activation import ACTIVATIONS
from tritonnorm.fold import fold
from tritonnorm.fold.modules import ChannelShift

SHAPE = (2, 4, 5, 5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_goes_along(name: str) -> None:
    activation = ACTIVATIONS[name]
    act = activation.module(*(value + 0.3 for _, value in activation.defaults))
    model = trained(Net(lambda m, x: m.a(m.b(x.tanh())), a=act, b=bn(4)))
    x = rand(*SHAPE)
    folded, report = fold(model, x)
    assert report.counts == {"fused": 1} and report.rows[0].partner == "a", str(report)
    assert type(folded.b) is tritonnorm.BatchNorm2d and type(folded.a) is nn.Identity
    assert folded.b.running_mean.data_ptr() != model.b.running_mean.data_ptr()
    assert type(model.b) is nn.BatchNorm2d and not hasattr(model.b, "activation")
    assert error(model, folded, x) <= LIMIT and report.error <= LIMIT
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert copy.deepcopy(folded).b.activation == folded.b.activation


def test_a_reduced_batch_norm_takes_its_activation_along(monkeypatch: pytest.MonkeyPatch) -> None:
    model = positive(
        trained(Net(lambda m, x: m.c(m.a(m.b(x))) + x, a=nn.ReLU(), b=bn(4), c=conv(4, 4)))
    )
    x = rand(*SHAPE)
    folded, report = fold(model, x)
    assert report.counts == {"reduced": 1}, str(report)
    assert isinstance(folded.b, ChannelShift) and type(folded.a) is nn.Identity
    assert error(model, folded, x) <= LIMIT
    monkeypatch.setattr("tritonnorm.settings.interpreting", lambda: False)  # as on a plain CPU
    assert error(model, folded, x) <= LIMIT
    assert "activation=relu" in str(folded.b)


def two_users(m: Any, x: Tensor) -> Tensor:
    y = m.b(x.tanh())
    return m.a(y) + y.sigmoid()


def shared(m: Any, x: Tensor) -> Tensor:
    return m.a(m.b(x.tanh())) + m.a(x)


KEPT = {
    "two users": two_users,
    "shared activation": shared,
    "something between": lambda m, x: m.a(m.b(x.tanh()) * 2),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_also_used_elsewhere_stays(name: str) -> None:
    model = trained(Net(KEPT[name], a=nn.ReLU(), b=bn(4)))
    x = rand(*SHAPE)
    folded, report = fold(model, x, verify=False)
    assert report.counts == {"left": 1}, str(report)
    assert error(model, folded, x) == 0


def test_a_hook_on_the_activation_keeps_it() -> None:
    model = trained(Net(lambda m, x: m.a(m.b(x.tanh())), a=nn.ReLU(), b=bn(4)))
    model.a.register_forward_hook(lambda *_: None)
    assert fold(model, rand(*SHAPE))[1].counts == {"left": 1}


def test_undo_of_a_fused_pair() -> None:
    model = trained(Net(lambda m, x: m.a(m.b(x.tanh())), a=nn.ReLU(), b=bn(4)))
    before = (model.a, model.b)
    _, report = fold(model, rand(*SHAPE), inplace=True)
    assert torch.equal(model.b.running_mean, before[1].running_mean)
    report.undo()
    assert (model.a, model.b) == before


def test_a_forward_of_replace_goes_with_its_batch_norms() -> None:
    def part() -> nn.Module:
        return nn.Sequential(conv(4, 4), bn(4), nn.ReLU())

    model, x = trained(nn.Sequential(part(), part())), rand(*SHAPE)
    tritonnorm.replace(model)
    folded, report = fold(model, x, filter_fn=lambda _, name: name.startswith("0"))
    assert report.counts == {"folded": 1, "left": 1}, str(report)
    assert "forward" not in folded[0].__dict__ and "forward" in folded[1].__dict__
    assert not any("data_parallel" in name for name in folded[0].__dict__)
    assert "forward" in model[0].__dict__ and error(model, folded, x) <= LIMIT
    report.undo()
    own = folded[0].forward
    assert own.module is folded[0] and own.norms == (folded[0][1],) and not own.gone()
    assert error(model, folded, x) == 0.0
