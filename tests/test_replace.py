"""replace: the class changes and nothing else does."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tritonnorm
from tritonnorm.replace import replace, restore

PAIRS = [
    (nn.BatchNorm1d, tritonnorm.BatchNorm1d, (4, 5, 3)),
    (nn.BatchNorm2d, tritonnorm.BatchNorm2d, (4, 5, 3, 2)),
    (nn.BatchNorm3d, tritonnorm.BatchNorm3d, (2, 5, 3, 2, 2)),
]


class Block(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.same = self.bn  # shared under a second name

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Odd(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(("plain", "swapped", "shape"), PAIRS)
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}]
)
def test_root_batch_norm_trains_as_before(
    plain: type[nn.Module], swapped: type[nn.Module], shape: tuple[int, ...], options: dict
) -> None:
    bn = plain(5, eps=1e-3, **options).double()
    theirs = copy.deepcopy(bn)
    tensors = {**dict(bn.named_parameters()), **dict(bn.named_buffers())}
    model, report = replace(bn)
    assert model is bn and type(bn) is swapped and isinstance(bn, plain)
    assert report.counts == {"replaced": 1} and report.rows[0].name == "(root)"
    now = {**dict(bn.named_parameters()), **dict(bn.named_buffers())}
    assert now.keys() == tensors.keys() and all(now[k] is tensors[k] for k in now)
    for training in (True, False):
        bn.train(training), theirs.train(training)
        x = torch.randn(shape, dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = bn(a), theirs(b)
        g = torch.randn_like(y)
        y.backward(g), z.backward(g)
        torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    for p, q in zip(bn.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
    for p, q in zip(bn.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_what_stays() -> None:
    model = nn.Sequential(OrderedDict(a=Block(), b=Block(4))).train()
    model.a.bn.eval()
    model.a.bn.mine = "kept"
    seen: list[str] = []
    model.a.bn.register_forward_hook(lambda *_: seen.append("forward"))
    optimizer = torch.optim.SGD(model.parameters())
    keys, module = list(model.state_dict()), model.a.bn
    _, report = replace(model)
    assert model.a.bn is module and model.a.same is module
    assert list(model.state_dict()) == keys
    assert model.a.bn.mine == "kept" and not model.a.bn.training and model.b.bn.training
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert seen == ["forward"]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert [row.name for row in report.rows] == ["a.bn", "b.bn"]  # once, although it has two names
    assert "BatchNorm" in type(model.a.bn).__name__


def test_copy_and_pickle() -> None:
    model, _ = replace(Block().eval())
    x = torch.randn(1, 3, 5, 5)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in others:
        assert type(other.bn) is tritonnorm.BatchNorm2d
        assert torch.equal(other(x), model(x))
        assert type(restore(other).bn) is nn.BatchNorm2d


def test_restore_gives_the_original_back() -> None:
    model = Block()
    own = tritonnorm.BatchNorm2d(4, activation="relu")
    model.tail = own
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    replace(model)
    assert restore(model) is model
    assert type(model.bn) is nn.BatchNorm2d
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    # a module built as one of ours is no replacement
    assert type(model.tail) is tritonnorm.BatchNorm2d and model.tail.activation == "relu"


def test_twice_is_once() -> None:
    model, first = replace(Block())
    _, second = replace(model)
    assert first.counts == {"fused": 1} and second.counts == {"left": 1}
    assert "already" in second.rows[0].reason


def _odd_one(change: str) -> nn.Module:
    bn = nn.BatchNorm2d(4)
    if change == "subclass":
        return Odd(4)
    if change == "lazy":
        return nn.LazyBatchNorm2d()
    if change == "quantised":
        return torch.ao.nn.quantized.BatchNorm2d(4)
    if change == "parametrised":
        return parametrize.register_parametrization(bn, "weight", Double())
    if change == "scripted":
        return torch.jit.script(bn)
    if change == "patched":
        bn.forward = lambda x: x  # type: ignore[method-assign]
    if change == "named":
        bn.activation = nn.ReLU()
    if change == "compiled":
        bn.compile(backend="eager")
    return bn


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("subclass", "not exactly torch's class"),
        ("lazy", "lazy"),
        ("quantised", "not exactly torch's class"),
        ("parametrised", "parametrised"),
        ("patched", "replaced on the instance"),
        ("named", "attribute of its own named activation"),
        ("compiled", "compiled"),
        ("scripted", "TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_left_with_its_reason(change: str, reason: str) -> None:
    module = _odd_one(change)
    model = nn.Sequential(module, nn.BatchNorm2d(4))
    kind, attributes = type(module), dict(module.__dict__)
    _, report = replace(model)
    assert type(model[0]) is kind and dict(module.__dict__) == attributes
    assert report.rows[0].decision == "left" and reason in report.rows[0].reason
    assert type(model[1]) is tritonnorm.BatchNorm2d, "one odd batch norm must not cost the rest"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_compiled_models_are_left_whole() -> None:
    for model in (torch.jit.script(Block().eval()), torch.compile(Block(), backend="eager")):
        _, report = replace(model)
        assert set(report.counts) == {"left"}
        assert all("before" in row.reason for row in report.rows)


def test_tensor_subclass_is_left() -> None:
    class Sharded(Tensor):
        pass

    bn = nn.BatchNorm2d(4)
    bn.running_mean = bn.running_mean.as_subclass(Sharded)
    _, report = replace(bn)
    assert type(bn) is nn.BatchNorm2d and "Sharded" in report.rows[0].reason


def test_meta_tensors_are_named() -> None:
    _, report = replace(nn.BatchNorm2d(4, device="meta"))
    assert report.rows[0].decision == "replaced" and "meta device" in report.rows[0].reason


def test_filter_and_dry_run() -> None:
    model = nn.Sequential(OrderedDict(a=Block(), b=Block()))
    _, report = replace(model, dry_run=True)
    assert report.counts == {"fused": 2} and "dry run" in str(report)
    assert "forward" not in model.a.__dict__
    assert type(model.a.bn) is nn.BatchNorm2d
    asked: list[tuple[nn.Module, str]] = []

    def only_b(module: nn.Module, name: str) -> bool:
        asked.append((module, name))
        return name.startswith("b.")

    _, report = replace(model, filter_fn=only_b)
    assert asked == [(model.a.bn, "a.bn"), (model.b.bn, "b.bn")]
    assert type(model.a.bn) is nn.BatchNorm2d and type(model.b.bn) is tritonnorm.BatchNorm2d
    assert report.rows[0].reason == "left out by filter_fn"


def test_nothing_half_done() -> None:
    class Stubborn(type(nn.BatchNorm2d(1))):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            if name == "__class__" and value is tritonnorm.BatchNorm2d:
                raise TypeError("no")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    before = [dict(m.__dict__) for m in model]
    calls = 0

    def broken(module: nn.Module, name: str) -> bool:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        replace(model, filter_fn=broken)
    assert [type(m) for m in model] == [nn.BatchNorm2d] * 2
    # the same when the change itself fails at the second module
    from tritonnorm.replace import SWAPS, _edit

    stubborn = Stubborn(4)
    SWAPS[Stubborn] = tritonnorm.BatchNorm2d
    try:
        with pytest.raises(TypeError, match="no"):
            _edit([model[0], stubborn], {})
    finally:
        del SWAPS[Stubborn]
    assert type(model[0]) is nn.BatchNorm2d and dict(model[0].__dict__) == before[0]


def test_without_fusing() -> None:
    model, report = replace(Block(), fuse=False)
    assert report.counts == {"replaced": 1} and "forward" not in model.__dict__


def test_model_without_batch_norm_and_bad_argument() -> None:
    _, report = replace(nn.Linear(2, 2))
    assert report.rows == [] and "no batch norm" in str(report)
    with pytest.raises(ValueError, match=r"model: expected a torch\.nn\.Module, got int"):
        replace(3)  # type: ignore[arg-type]


@pytest.mark.zoo
def test_transformers_resnet_trains_as_before() -> None:
    try:
        from transformers import ResNetConfig, ResNetModel
    except ImportError as error:
        pytest.skip(f"transformers' ResNet cannot be imported: {error}")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1])
    theirs = ResNetModel(config).double().train()
    ours, report = replace(copy.deepcopy(theirs))
    assert report.counts == {"fused": 13, "replaced": 3}  # three shortcuts are the other operand
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for model in (theirs, ours):
        model(x).last_hidden_state.square().mean().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=name)
    for p, q in zip(theirs.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-10)
    restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


def test_restore_says_what_it_cannot_restore(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = replace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    nn.utils.parametrizations.weight_norm(model[1], dim=None)
    restore(model)
    assert type(model[2]) is nn.BatchNorm2d and isinstance(model[1], tritonnorm.BatchNorm2d)
    assert "restore: 1 stays" in caplog.text
