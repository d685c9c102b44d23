"""BatchNormAct2d: timm's signature and submodules, our kernel, and fold."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonnorm
from tests import matrix
from tritonnorm import BatchNormAct2d, convert_sync_batchnorm
from tritonnorm.activation import ACTIVATIONS, of_module


class TimmLike(nn.BatchNorm2d):
    """What timm's class computes, with its submodules."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = drop or nn.Identity()
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def twin(module: BatchNormAct2d) -> TimmLike:
    other = TimmLike(module.num_features, copy.deepcopy(module.act), copy.deepcopy(module.drop))
    other.train(module.training)
    other.load_state_dict(module.state_dict())
    return other


def assert_same_step(module: BatchNormAct2d, kernels: int) -> None:
    """Output, gradients and buffers are those of three modules in a row."""
    other = twin(module)
    x = torch.randn(3, module.num_features, 4, 5)
    outcomes = []
    for each in (module, other):
        own = x.clone().requires_grad_()
        each.zero_grad()
        torch.manual_seed(1)
        with matrix.ran() as ran:
            y = each(own)
            (y.sin()).sum().backward()
        outcomes.append([y, own.grad, *(p.grad for p in each.parameters()), *each.buffers()])
        assert len(ran) == (kernels if each is module else 0)
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_signature() -> None:
    """Names and order of timm 1.0: arguments are given by position in its models too."""
    assert list(inspect.signature(BatchNormAct2d).parameters) == [
        *("num_features", "eps", "momentum", "affine", "track_running_stats", "apply_act"),
        *("act_layer", "act_kwargs", "inplace", "drop_layer", "device", "dtype"),
    ]
    assert type(BatchNormAct2d(4).act) is nn.ReLU and BatchNormAct2d(4).act.inplace
    assert type(BatchNormAct2d(4, apply_act=False).act) is nn.Identity
    assert type(BatchNormAct2d(4, act_layer=None).act) is nn.Identity
    with pytest.raises(ValueError, match=r"^activation"):
        BatchNormAct2d(4, act_layer="swish2")


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"apply_act": False}, True),
        ({"act_layer": "silu"}, True),
        ({"act_layer": nn.GELU, "act_kwargs": {"approximate": "tanh"}}, True),
        ({"act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.2}}, True),
        ({"act_layer": nn.PReLU}, False),
        ({"drop_layer": nn.Dropout2d}, False),
    ],
    ids=str,
)
def test_trains_as_its_parts(options: dict[str, Any], fused: bool) -> None:
    module = BatchNormAct2d(4, **options)
    assert_same_step(module, kernels=2)
    launches = module.epilogue() is not None
    assert launches == fused
    assert_same_step(module.eval(), kernels=2)
    if "drop_layer" in options:
        assert module.epilogue() == ("relu", ())


def test_a_hook_on_the_activation_sees_its_call() -> None:
    module, seen = BatchNormAct2d(4), []
    module.act.register_forward_hook(lambda m, args, y: seen.append(y))
    y = module(torch.randn(3, 4, 2, 2))
    assert len(seen) == 1 and seen[0] is y


def test_residual_and_change_of_activation_at_run_time() -> None:
    module, plain = BatchNormAct2d(4), nn.BatchNorm2d(4)
    x, z = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(module(x, z), F.relu(plain(x) + z))
    module.act = nn.PReLU(4)
    torch.testing.assert_close(module(x, z), module.act(plain(x) + z))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_known_by_its_module(name: str) -> None:
    activation = ACTIVATIONS[name]
    values = tuple(v + 0.25 for _, v in activation.defaults)
    assert of_module(activation.module(*values)) == (name, values)


def test_other_modules_are_no_activation() -> None:
    class Mine(nn.ReLU):
        pass

    assert of_module(nn.Identity()) == (None, ())
    assert of_module(nn.PReLU()) is None and of_module(Mine()) is None


# dynamo makes an instance of the function itself, and warns about it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_and_exported() -> None:
    torch._dynamo.reset()
    module, x = BatchNormAct2d(4, act_layer="silu"), torch.randn(3, 4, 2, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    program = torch.export.export(module.eval(), (x,))
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert called == ["aten.batch_norm.default", "aten.silu.default"]


class Net(nn.Module):
    """As a model of timm or torchvision that takes its norm layer."""

    def __init__(self, norm_layer: Any, **options: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), norm_layer(8, **options)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), norm_layer(8, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.PReLU])
@pytest.mark.parametrize("synchronized", [False, True])
def test_fold(act_layer: Any, given: bool, synchronized: bool) -> None:
    net = Net(BatchNormAct2d, act_layer=act_layer)
    if synchronized:
        convert_sync_batchnorm(net)
    x = torch.randn(2, 3, 9, 9)
    net(x)
    net.eval()
    folded, report = tritonnorm.fold(net, example_inputs=(x,) if given else None)
    if given and act_layer is nn.ReLU:  # torch's PReLU cannot be checked in float64 on the CPU
        assert [row.decision for row in report.rows] == ["folded"] * 2
        assert type(folded.bn1) is act_layer
    torch.testing.assert_close(folded(x), net(x))


@pytest.mark.parametrize("norm_layer", [tritonnorm.BatchNorm2d, BatchNormAct2d])
def test_replace_leaves_what_is_ours(norm_layer: Any) -> None:
    net = Net(norm_layer)
    _, report = tritonnorm.replace(net)
    assert {row.decision for row in report.rows} == {"left"}
    assert all("already" in row.reason for row in report.rows)


def test_hooks_of_all_modules_see_drop_and_activation() -> None:
    seen: list[str] = []
    module = BatchNormAct2d(3).eval()
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, *_: seen.append(type(m).__name__)
    )
    try:
        module(torch.randn(2, 3, 2, 2))
    finally:
        hook.remove()
    assert seen == ["Identity", "ReLU", "BatchNormAct2d"]
