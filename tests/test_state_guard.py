"""A model that was run to look at it is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tritonnorm
from tritonnorm.flow.guard import StateGuard


class Packed(nn.Module):
    """Two batch norms whose running statistics are parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        packed = torch.arange(16.0)
        for i, bn in enumerate((self.first, self.second)):
            bn.running_mean = packed[8 * i : 8 * i + 4]
            bn.running_var = packed[8 * i + 4 : 8 * i + 8]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.conv(x))))


def test_buffers_that_share_memory_are_put_back() -> None:
    model = Packed().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    guard = StateGuard(model)
    with guard:
        model(torch.randn(2, 3, 4, 4))
    assert not torch.equal(model.first.running_mean, before["first.running_mean"])
    guard.restore()
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("by", [tritonnorm.replace, tritonnorm.fold])
def test_what_looks_at_a_model_leaves_them(by) -> None:
    model = Packed().train(by is tritonnorm.replace)
    before = [t.clone() for t in (model.first.running_mean, model.second.running_var)]
    x = torch.randn(2, 3, 4, 4)
    by(model, example_inputs=x, dry_run=True)
    after = [model.first.running_mean, model.second.running_var]
    assert all(map(torch.equal, before, after))
