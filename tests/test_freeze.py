"""freeze(model): the same function and gradients as fixed statistics, folded in every step."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonnorm
from tests.blocks import close, randomize
from tritonnorm import frozen


class Net(nn.Module):
    """Every kind of pair, one batch norm without a layer, and a module of `conv_nn`."""

    def __init__(self, again: str = "") -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(True))
        self.up = nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4, bias=False)
        self.norm = tritonnorm.BatchNorm2d(12, eps=1e-2, activation="silu")
        self.block = tritonnorm.ConvBatchNorm2d(12, 12, 3, padding=1, activation="relu")
        self.alone = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)
        self.last = nn.BatchNorm1d(5, affine=False)
        self.again = again

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(x))
        return self.block(x, x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.again:
            x = checkpoint(self.body, x, use_reentrant=self.again == "reentrant")
        else:
            x = self.body(x)
        return self.last(self.head(self.alone(x).mean((2, 3))))


PAIRS = ["first.1", "norm", "block.bn", "last"]


def sample(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 9, 9, generator=g, dtype=torch.float64)


def net(again: str = "") -> Net:
    model = Net(again).double()
    randomize(model)
    return model


def fixed(model: nn.Module) -> nn.Module:
    """A copy as people freeze it by hand: in training mode, with its paired norms in eval mode."""
    twin = copy.deepcopy(model).train()
    for name in PAIRS:
        twin.get_submodule(name).eval()
    return twin


def steps(model: nn.Module, count: int = 3) -> list[Tensor]:
    """Outputs and, at the end, gradients and state of some steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for i in range(count):
        optimizer.zero_grad()
        y = model(sample(i))
        y.square().sum().backward()
        optimizer.step()
        found.append(y.detach())
    found += [p.grad for p in model.parameters() if p.grad is not None]
    return found + [t for t in model.state_dict().values() if t.is_floating_point()]


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for mine, theirs in zip(a, b, strict=True):
        close(mine, theirs, 1e-9)


@pytest.mark.parametrize("again", ["", "reentrant", "not reentrant"])
def test_trains_as_with_fixed_statistics(again: str) -> None:
    model = net()
    twin = fixed(model)
    before = {k: v.clone() for k, v in model.named_buffers()}
    names = list(model.state_dict())
    parameters = list(model.parameters())
    model, report = tritonnorm.freeze(model, sample())
    assert [row.name for row in report.rows if row.decision == "frozen"] == PAIRS
    assert [row.name for row in report.skipped] == ["alone"]
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    model.train()
    model.again = twin.again = again  # type: ignore[assignment]
    same(steps(model), steps(twin))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) != name.startswith("alone"), name


def test_one_fold_a_forward_and_none_outside() -> None:
    model, _ = tritonnorm.freeze(net(), sample())
    calls: list[int] = []
    fold = frozen.fold_all

    def counted(sources: Any) -> Any:
        calls.append(len(sources))
        return fold(sources)

    with mock.patch.object(frozen, "fold_all", counted):
        model(sample()).sum().backward()
        assert calls == [4]
        y = model.first(sample())  # a part alone
        assert calls == [4, 1]
        y.sum().backward()
        model.first[0].weight.data.mul_(2)
        close(model.first(sample()), model.first[2](_apart(model)))


def _apart(model: Net) -> Tensor:
    conv, bn = model.first[0], model.first[1]
    y = nn.functional.conv2d(sample(), conv.weight, conv.bias, groups=2)
    return nn.functional.batch_norm(
        y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps
    )


def test_nothing_is_kept_without_gradients_or_after_an_error() -> None:
    model, _ = tritonnorm.freeze(net(), sample())
    states = [m._frozen for m in model.modules() if isinstance(m, frozen.FrozenLayer)]
    assert len(states) == 4
    with torch.no_grad():
        model(sample())
    assert all(s.folded is None and not s.open for s in states)
    with pytest.raises(RuntimeError):
        model(sample()[:, :2])
    assert not any(s.open for s in states)


def test_less_is_saved_for_backward() -> None:
    """Neither the convolution's output nor statistics: what the folded convolution needs is x."""

    def saved(model: nn.Module, x: Tensor) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        assert y.requires_grad
        return sum(sizes.values())

    x = torch.randn(4, 8, 32, 32)
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)).eval()
    model, _ = tritonnorm.freeze(copy.deepcopy(plain), x)
    output = x.numel() * x.element_size()
    assert saved(plain, x) >= 2 * output
    assert saved(model, x) < 1.1 * output


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_copies_are_frozen_models_of_their_own(kind: str) -> None:
    model, _ = tritonnorm.freeze(net(), sample())
    model(sample())
    other = copy.deepcopy(model) if kind == "deepcopy" else pickle.loads(pickle.dumps(model))
    same(steps(other), steps(copy.deepcopy(model)))
    assert other.first[0]._frozen.bn is other.first[1]
    (hook,) = other._forward_pre_hooks.values()
    assert all(layer in list(other.modules()) for layer in hook.__self__.layers)
    tritonnorm.unfreeze(other)
    assert not other._forward_pre_hooks and len(model._forward_pre_hooks) == 1


def test_unfreeze() -> None:
    model = net()
    classes = [type(m) for m in model.modules()]
    tritonnorm.freeze(model, sample())
    assert classes != [type(m) for m in model.modules()]
    with torch.no_grad():
        y = model.eval()(sample())
    assert tritonnorm.unfreeze(model) is model
    assert classes == [type(m) for m in model.modules()]
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not model._forward_hooks_always_called and "_frozen" not in model.up.__dict__
    with torch.no_grad():
        close(model(sample()), y, 1e-12)


def test_mode_and_state_stay_in_the_search() -> None:
    model = net().train()
    model.first.eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    tritonnorm.freeze(model, sample())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


class TwoFaced(nn.Module):
    """The output of the layer is used elsewhere: in one mode only."""

    def __init__(self, when_training: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.when = when_training

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y if self.training == self.when else self.bn(y)


@pytest.mark.parametrize("when", [True, False])
def test_a_use_in_one_mode_only(when: bool) -> None:
    _, report = tritonnorm.freeze(TwoFaced(when), sample().float())
    assert f"in {'training' if when else 'eval'} mode: the output of conv is also used" in str(
        report.skipped[0].reason
    )


def test_dropout_between_layer_and_norm() -> None:
    """Nothing in eval mode, but not in training: what fold does there must not happen here."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4))
    _, report = tritonnorm.freeze(model, sample().float())
    assert len(report.skipped) == 1


def test_without_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(392, 3))
    model, report = tritonnorm.freeze(model)
    assert report.counts == {"frozen": 1}
    model(sample().float()).sum().backward()


def test_what_is_left() -> None:
    model, report = tritonnorm.freeze(net(), sample(), dry_run=True)
    assert report.counts == {"frozen": 4, "left": 1} and "dry run" in report.summary
    assert not any(type(m) in frozen.PLAIN for m in model.modules())
    _, report = tritonnorm.freeze(model, sample(), filter_fn=lambda bn, name: name == "norm")
    assert report.counts == {"left": 4, "frozen": 1}
    _, report = tritonnorm.freeze(model, sample())
    assert [r.reason for r in report.skipped if r.name == "norm"] == ["it is frozen already"]
    model.first[1].running_var[2] = -1.0
    tritonnorm.unfreeze(model)
    _, report = tritonnorm.freeze(model, sample())
    assert "is negative" in next(r.reason for r in report.skipped if r.name == "first.1")
    with pytest.raises(ValueError, match="model: expected"):
        tritonnorm.freeze("model")  # type: ignore[arg-type]


def test_a_shared_layer_of_a_joined_module_is_left() -> None:
    block = tritonnorm.ConvBatchNorm2d(4, 4, 1)
    model = nn.ModuleDict({"block": block, "conv": block.conv})
    model.forward = lambda x: model["block"](x) + model["conv"](x)  # type: ignore[method-assign]
    _, report = tritonnorm.freeze(model, sample().float())
    assert report.counts == {"left": 1}


def test_a_wrong_rank_is_refused() -> None:
    model, _ = tritonnorm.freeze(tritonnorm.LinearBatchNorm1d(4, 4))
    with pytest.raises(ValueError, match="expected 2 dimensions, got 3"):
        model(torch.randn(2, 4, 4))


def test_compiled() -> None:
    model, _ = tritonnorm.freeze(net(), sample())
    y = model(sample())
    close(torch.compile(model, backend="aot_eager")(sample()), y)
    torch._dynamo.reset()
