"""fold_state_dict: the tensors of a checkpoint, folded as fold folds the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tritonnorm
from tests.fold_models import X, rand, trained


def net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU()),
        *(nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4, affine=False)),
        *(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)),
    )


def test_a_checkpoint_folds_as_the_model_does() -> None:
    model, x = trained(net()), rand(*X)
    folded, report = tritonnorm.fold(trained(net(), seed=1), x)  # the architecture only
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    got, rows = tritonnorm.fold_state_dict(state, report, eps={"1": 1e-3})
    assert rows.counts == {"folded": 3}, str(rows)
    folded.load_state_dict(got)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    by_name, rows = tritonnorm.fold_state_dict(state, {"1": "0"}, eps=1e-3)
    assert [row.decision for row in rows.rows] == ["folded", "left", "left"]
    assert torch.equal(by_name["0.weight"], got["0.weight"]) and "4.running_mean" in by_name


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"2": "0"}, "expected a batch norm with running statistics, got '2'"),
        ({"1": "2"}, "expected a convolution or linear layer, got '2'"),
        ({"1": "6"}, "expected '6' to give the 4 channels of '1'"),
        ({"1": "0", "4": "0"}, "expected each layer once, got '0'"),
    ],
)
def test_pairs_that_do_not_fit(pairs: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tritonnorm.fold_state_dict(net().state_dict(), pairs)


def test_bad_statistics_stay() -> None:
    model: Any = net()
    model[1].running_var[2] = -1
    state, report = tritonnorm.fold_state_dict(model.state_dict(), {"1": "0", "4": "3"})
    assert "running_var is negative (channel 2)" in report.rows[0].reason
    assert "1.running_var" in state and report.counts == {"left": 2, "folded": 1}
