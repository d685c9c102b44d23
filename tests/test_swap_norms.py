"""replace(model, norms=...): group, layer, instance and RMS norms change their class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonnorm
from tritonnorm.norms.swap import NORMS


class Own(nn.LayerNorm):
    """A subclass, which may compute something else."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.InstanceNorm2d(4), nn.BatchNorm2d(4),
        nn.LayerNorm((6, 6)), nn.RMSNorm(6), Own(6),
    )  # fmt: skip


def test_every_kind() -> None:
    net, x = model(), torch.randn(2, 3, 8, 8)
    expected, keys = net(x), list(net.state_dict())
    found, report = tritonnorm.replace(net, norms=NORMS)
    assert found is net and list(net.state_dict()) == keys
    kinds = [type(m).__name__ for m in net if type(m).__module__.startswith("tritonnorm.n")]
    assert kinds == ["GroupNorm", "InstanceNorm2d", "BatchNorm2d", "LayerNorm", "RMSNorm"]
    assert report.counts == {"fused": 1, "replaced": 4, "left": 1}
    assert report.rows[0].rule == "gn -> silu"
    assert "not exactly torch's class" in report.skipped[0].reason
    torch.testing.assert_close(net(x), expected)
    tritonnorm.restore(net)
    assert all(type(m).__module__.startswith("torch.") for m in list(net)[:-1])
    assert not any(hasattr(m, "activation") for m in net)


def test_only_what_is_asked_for() -> None:
    net, report = tritonnorm.replace(model())
    assert [row.kind for row in report.rows] == ["BatchNorm2d"]
    net, report = tritonnorm.replace(model(), norms=("group", "rms"), dry_run=True)
    assert {row.kind for row in report.rows} == {"GroupNorm", "RMSNorm"}
    assert type(net[1]) is nn.GroupNorm
    net, report = tritonnorm.replace(
        model(), norms=("group", "layer"), filter_fn=lambda module, name: name != "1"
    )
    assert report.skipped[0].reason == "left out by filter_fn"
    assert type(net[5]) is tritonnorm.LayerNorm


def test_what_is_left() -> None:
    net = nn.Sequential(nn.GroupNorm(1, 2), nn.GroupNorm(1, 2), nn.GroupNorm(1, 2))
    net[0].activation = "own"
    net[1].forward = lambda x: x
    nn.utils.parametrizations.weight_norm(net[2])
    _, report = tritonnorm.replace(net, norms=("group",))
    assert [row.decision for row in report.rows] == ["left"] * 3
    _, report = tritonnorm.replace(tritonnorm.GroupNorm(1, 2), norms=("group",))
    assert report.rows[0].reason == "it is already a norm of this library"
    whole = nn.Sequential(nn.GroupNorm(1, 2))
    whole.compile(backend="eager")
    _, report = tritonnorm.replace(whole, norms=("group",))
    assert report.rows[0].reason.startswith("it is compiled")


@pytest.mark.parametrize("norms", ["group", ("group", "switch")])
def test_unknown_names(norms: object) -> None:
    with pytest.raises(ValueError, match="norms: expected a tuple of batch, group"):
        tritonnorm.replace(model(), norms=norms)
