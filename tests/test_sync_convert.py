"""SyncBatchNorm without a process group; convert_sync_batchnorm keeps what torch's loses, and
revert_sync_batchnorm gives it back."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonnorm
from tests.ranks import Ranks
from tritonnorm import (
    BatchNorm2d,
    BatchNormAct2d,
    ConvBatchNorm2d,
    SyncBatchNorm,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from tritonnorm.sync.nn import SyncBatchNormAct2d


def test_constructor_is_torchs() -> None:
    mine = inspect.signature(SyncBatchNorm).parameters
    theirs = inspect.signature(torch.nn.SyncBatchNorm).parameters
    assert list(mine)[: len(theirs)] == list(theirs)
    assert all(mine[n].default == p.default and mine[n].kind == p.kind for n, p in theirs.items())
    assert issubclass(SyncBatchNorm, torch.nn.SyncBatchNorm)
    with pytest.raises(ValueError, match=r"^activation"):
        SyncBatchNorm(3, activation="swish")


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_a_plain_batch_norm(training: bool) -> None:
    """Without a process group, on the CPU too."""
    x, z = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    ours = SyncBatchNorm(4, activation="relu").train(training)
    plain = torch.nn.BatchNorm2d(4).train(training)
    torch.testing.assert_close(ours(x, z), F.relu(plain(x) + z))
    torch.testing.assert_close(ours.running_var, plain.running_var)
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    torch.testing.assert_close(again(x, z), ours(x, z))
    with pytest.raises(ValueError, match="at least 2D"):
        ours(torch.randn(4))


class Net(nn.Module):
    """Batch norms of torch and of ours, one of them in two places, one in eval mode, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.block = nn.Sequential(BatchNorm2d(4, activation="silu"), self.bn)
        self.act = BatchNormAct2d(4)
        self.joined = ConvBatchNorm2d(4, 4, 1, activation="relu")
        self.frozen = nn.BatchNorm2d(4).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.joined(self.act(self.block(self.bn(self.conv(x))))))


def state(net: nn.Module) -> list[Any]:
    return [
        (name, id(module), module.training, len(module._forward_hooks), type(module))
        for name, module in net.named_modules(remove_duplicate=False)
    ]


def test_conversion_is_a_change_of_class_alone() -> None:
    net, seen = Net(), []
    net.bn.register_forward_hook(lambda *_: seen.append(1))
    before, tensors = state(net), {n: id(p) for n, p in net.named_parameters()}
    x = torch.randn(2, 3, 5, 5)
    plain = copy.deepcopy(net)(x)
    seen.clear()
    assert convert_sync_batchnorm(net) is net
    assert [row[:4] for row in state(net)] == [row[:4] for row in before]
    assert {n: id(p) for n, p in net.named_parameters()} == tensors
    assert type(net.bn) is type(net.frozen) is type(net.joined.bn) is SyncBatchNorm
    assert type(net.act) is SyncBatchNormAct2d
    assert net.block[0].activation == "silu" and net.joined.bn.activation == "relu"
    torch.testing.assert_close(net(x), plain)  # no process group: plain batch norms
    assert len(seen) == 2
    assert isinstance(pickle.loads(pickle.dumps(copy.deepcopy(net.act))), SyncBatchNormAct2d)
    assert revert_sync_batchnorm(net) is net
    assert state(net) == before
    assert not any("process_group" in m.__dict__ for m in net.modules())


def test_torchs_sync_batch_norm_keeps_its_group() -> None:
    module = nn.SyncBatchNorm(4, process_group="a group")
    convert_sync_batchnorm(module, "another")
    assert type(module) is SyncBatchNorm and module.process_group == "another"
    convert_sync_batchnorm(module, "a third")
    assert module.process_group == "a third"
    revert_sync_batchnorm(module)
    assert type(module) is nn.SyncBatchNorm and module.process_group == "a group"
    built = SyncBatchNorm(4)
    assert type(revert_sync_batchnorm(built)) is SyncBatchNorm  # it was not converted
    assert type(SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3))) is SyncBatchNorm


def test_unknown_classes_stay_with_a_warning() -> None:
    class Mine(nn.BatchNorm2d):
        pass

    net = nn.Sequential(Mine(4), nn.BatchNorm2d(4), nn.LayerNorm(3))
    with pytest.warns(UserWarning, match=r"^0: a .*Mine is left"):
        convert_sync_batchnorm(net)
    assert [type(m) for m in net] == [Mine, SyncBatchNorm, nn.LayerNorm]
    with pytest.raises(ValueError, match=r"^module"):
        convert_sync_batchnorm(3)  # type: ignore[arg-type]


def step_of_rank(rank: int, group: Any) -> list[Tensor]:
    torch.manual_seed(0)
    net = convert_sync_batchnorm(Net().double(), group)
    x = torch.randn(5, 3, 5, 5, dtype=torch.float64)[2 * rank : 2 + 3 * rank]
    net(x).square().sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    for gradient in gradients:  # DDP does this; it refuses any SyncBatchNorm on the CPU
        torch.distributed.all_reduce(gradient, group=group)
    return [*gradients, *net.buffers()]


def test_a_converted_model_trains_as_one_process(pool: Ranks) -> None:
    torch.manual_seed(0)
    whole = Net().double()
    x = torch.randn(5, 3, 5, 5, dtype=torch.float64)
    whole(x).square().sum().backward()
    expected = [p.grad for p in whole.parameters() if p.grad is not None] + list(whole.buffers())
    for found in pool.run(step_of_rank, world=2):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


class Block(nn.Module):
    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3, process_group=group)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + x)


def test_replace_takes_torchs() -> None:
    block = Block("a group").eval()
    seen: list[Tensor] = []
    block.bn.register_forward_hook(lambda m, x, y: seen.append(y))
    tensors = dict(block.bn.__dict__["_parameters"])
    x = torch.randn(2, 3, 5, 5)
    expected = block(x)
    _, report = tritonnorm.replace(block)
    assert type(block.bn) is SyncBatchNorm and block.bn.process_group == "a group"
    assert block.bn._parameters == tensors and "hook" in report.rows[0].reason
    torch.testing.assert_close(block(x), expected)
    assert len(seen) == 2
    tritonnorm.restore(block)
    assert type(block.bn) is nn.SyncBatchNorm and block.bn.process_group == "a group"
    assert "activation" not in block.bn.__dict__
    # a batch norm that was replaced and then converted is not torch's synchronised one
    net = nn.Sequential(nn.BatchNorm2d(3))
    convert_sync_batchnorm(tritonnorm.replace(net)[0])
    assert type(tritonnorm.restore(net)[0]) is SyncBatchNorm
    tritonnorm.restore(revert_sync_batchnorm(net))
    assert type(net[0]) is nn.BatchNorm2d


def replaced_step_of_rank(rank: int, group: Any) -> list[Tensor]:
    torch.manual_seed(0)
    net, report = tritonnorm.replace(Block(group).double())
    assert report.rows[0].rule == "bn -> add -> relu" and "forward" in net.__dict__
    x = torch.randn(5, 3, 5, 5, dtype=torch.float64)[2 * rank : 2 + 3 * rank]
    net(x).square().sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    for gradient in gradients:
        torch.distributed.all_reduce(gradient, group=group)
    return [*gradients, *net.buffers()]


def test_a_replaced_model_trains_as_one_process(pool: Ranks) -> None:
    torch.manual_seed(0)
    whole = Block().double()
    x = torch.randn(5, 3, 5, 5, dtype=torch.float64)
    whole(x).square().sum().backward()  # without a process group a plain batch norm
    expected = [p.grad for p in whole.parameters() if p.grad is not None] + list(whole.buffers())
    for found in pool.run(replaced_step_of_rank, world=2):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_fold_takes_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4, activation="relu"))
    x = torch.randn(2, 3, 6, 6)
    net(x)
    folded, report = tritonnorm.fold(net.eval(), example_inputs=(x,))
    assert [row.decision for row in report.rows] == ["folded"]
    torch.testing.assert_close(folded(x), net(x))
