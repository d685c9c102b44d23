"""The modules, side by side with torch.nn's: state, errors, flags, copies, tracing."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonnorm
from tests import matrix
from tritonnorm import nn
from tritonnorm.activation import ACTIVATIONS

PAIRS = [
    (nn.BatchNorm1d, torch.nn.BatchNorm1d, (4, 5, 6)),
    (nn.BatchNorm2d, torch.nn.BatchNorm2d, (4, 5, 2, 3)),
    (nn.BatchNorm3d, torch.nn.BatchNorm3d, (2, 5, 2, 3, 2)),
]
HAS_BIAS = "bias" in inspect.signature(torch.nn.BatchNorm2d).parameters
both = pytest.mark.parametrize(("ours", "torchs", "shape"), PAIRS)


def twins(ours: Any, torchs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """One module of each kind with the same random state."""
    a, b = ours(*args, **kwargs), torchs(*args, **kwargs)
    with torch.no_grad():
        for p in b.parameters():
            p.normal_()
    a.load_state_dict(b.state_dict())
    return a, b


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    state, other = a.state_dict(), b.state_dict()
    assert list(state) == list(other)
    for name in state:
        torch.testing.assert_close(state[name], other[name])


@both
def test_constructor_parity(ours: Any, torchs: Any, shape: tuple[int, ...]) -> None:
    mine, theirs = inspect.signature(ours).parameters, inspect.signature(torchs).parameters
    positional = [n for n, p in theirs.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert list(mine)[: len(positional)] == positional
    for name in theirs:
        assert mine[name].default == theirs[name].default, name
        assert mine[name].kind == theirs[name].kind, name
    assert issubclass(ours, torchs)
    assert getattr(tritonnorm, ours.__name__) is ours


@both
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_same_as_torch(
    ours: Any,
    torchs: Any,
    shape: tuple[int, ...],
    affine: bool,
    track: bool,
    momentum: float | None,
) -> None:
    a, b = twins(ours, torchs, 5, 1e-3, momentum, affine, track)
    x = torch.randn(shape) * 2 + 1
    with matrix.ran() as ran:
        torch.testing.assert_close(a(x), b(x))
        assert_same_state(a, b)
        torch.testing.assert_close(a.eval()(x), b.eval()(x))
    assert len(ran) == 2
    assert_same_state(a, b)


def test_one_dimensional_input() -> None:
    a, b = twins(nn.BatchNorm1d, torch.nn.BatchNorm1d, 5)
    x = torch.randn(7, 5)
    torch.testing.assert_close(a(x), b(x))


@pytest.mark.skipif(not HAS_BIAS, reason="this torch has no bias argument")
@both
def test_without_bias(ours: Any, torchs: Any, shape: tuple[int, ...]) -> None:
    a, b = twins(ours, torchs, 5, bias=False)
    assert a.bias is None and list(a.state_dict()) == list(b.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(a(x), b(x))


@both
def test_state_dict_goes_both_ways(ours: Any, torchs: Any, shape: tuple[int, ...]) -> None:
    a, b = ours(5, activation="relu"), torchs(5)
    b(torch.randn(shape))
    a.load_state_dict(b.state_dict(), strict=True)
    assert_same_state(a, b)
    a(torch.randn(shape))
    c = torchs(5)
    c.load_state_dict(a.state_dict(), strict=True)
    assert_same_state(a, c)
    assert c.num_batches_tracked.item() == 2
    old = {k: v for k, v in b.state_dict().items() if k != "num_batches_tracked"}
    for module in (a, c):  # a state of version 1 has no counter
        module.load_state_dict(old, strict=True)


def _raised(module: torch.nn.Module, x: Tensor) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        module(x)
    return caught.type, str(caught.value)


@both
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kind", ["rank below", "rank above", "channels", "one value", "one value, no stats"]
)
def test_errors_are_torchs(
    ours: Any, torchs: Any, shape: tuple[int, ...], training: bool, kind: str
) -> None:
    track = kind != "one value, no stats"
    a, b = (m(5, track_running_stats=track).train(training) for m in (ours, torchs))
    bad = {
        "rank below": shape[1:] if len(shape) > 3 else shape[2:],
        "rank above": (*shape, 1),
        "channels": (shape[0], 6, *shape[2:]),
        "one value": (1, 5, *(1,) * (len(shape) - 2)),
        "one value, no stats": (1, 5, *(1,) * (len(shape) - 2)),
    }[kind]
    if kind == "one value" and not training:
        torch.testing.assert_close(a(torch.ones(bad)), b(torch.ones(bad)))
        return
    x = torch.randn(bad)
    before = {n: t.clone() for n, t in a.state_dict().items()}
    mine, theirs = _raised(a, x), _raised(b, x)
    assert mine[0] is theirs[0]
    # torch's own words, except that it names the argument of its kernel where we name ours.
    assert mine[1] == theirs[1]
    for name, value in a.state_dict().items():
        assert torch.equal(value, before[name]), name


@both
def test_flags_take_effect_at_the_next_call(ours: Any, torchs: Any, shape: tuple[int, ...]) -> None:
    a, b = twins(ours, torchs, 5)
    changes: list[dict[str, Any]] = [
        {"momentum": 0.5}, {"momentum": None}, {"eps": 0.1}, {"training": False},
        {"training": True},
        {"track_running_stats": False}, {"training": False}, {"training": True, "momentum": 0.2},
        {"track_running_stats": True, "num_batches_tracked": None}, {"momentum": None},
        {"running_mean": None, "running_var": None}, {"training": False}, {"weight": None},
        {"bias": None, "training": True},
    ]  # fmt: skip
    for change in changes:
        for module in (a, b):
            for name, value in change.items():
                setattr(module, name, value)
        x = torch.randn(shape) * 3 - 1
        torch.testing.assert_close(a(x), b(x), msg=lambda m, c=change: f"{c}: {m}")
        assert_same_state(a, b)


def test_activation_set_at_run_time() -> None:
    module, x = nn.BatchNorm1d(5), torch.randn(7, 5)
    plain = torch.nn.BatchNorm1d(5)
    module.activation = "leaky_relu"
    module.activation_args = (0.3,)
    torch.testing.assert_close(module(x), torch.nn.functional.leaky_relu(plain(x), 0.3))


@both
def test_activation_and_residual(ours: Any, torchs: Any, shape: tuple[int, ...]) -> None:
    a, b = twins(ours, torchs, 5)
    a.activation = "silu"
    x, residual = torch.randn(shape), torch.randn(shape)
    expected = torch.nn.functional.silu(b(x) + residual)
    torch.testing.assert_close(a(x, residual), expected)
    torch.testing.assert_close(a(x, residual=residual), torch.nn.functional.silu(b(x) + residual))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"activation": "swish"}, "activation"),
        ({"activation": "relu", "activation_args": (1,)}, "activation_args"),
        ({"activation_args": (1,)}, "activation_args"),
    ],
)
def test_bad_activation(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        nn.BatchNorm2d(3, **options)


@both
def test_repr(ours: Any, torchs: Any, shape: tuple[int, ...]) -> None:
    assert repr(ours(5)) == repr(torchs(5))
    text = repr(ours(5, activation="leaky_relu", activation_args=(0.2,)))
    assert text == repr(torchs(5))[:-1] + ", activation=leaky_relu, activation_args=(0.2,))"
    for nothing in (None, "none", "identity"):
        assert ours(5, activation=nothing).activation is None


def _pickled(module: torch.nn.Module) -> torch.nn.Module:
    return pickle.loads(pickle.dumps(module))


def _saved(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, _pickled, _saved])
def test_copies(duplicate: Any) -> None:
    module = nn.BatchNorm2d(5, momentum=0.3, activation="elu", activation_args=(0.5,))
    x = torch.randn(2, 5, 3, 3)
    module(x)
    twin = duplicate(module)
    assert type(twin) is nn.BatchNorm2d and repr(twin) == repr(module)
    assert torch.equal(twin.eval()(x), module.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_conversions(dtype: torch.dtype) -> None:
    """State converts as torch's module's; 16-bit input with fp32 state works too."""
    a, b = twins(nn.BatchNorm2d, torch.nn.BatchNorm2d, 5)
    x = torch.randn(3, 5, 2, 4)
    with matrix.ran() as ran:
        if dtype.itemsize == 2:
            assert a(x.to(dtype)).dtype == b(x.to(dtype)).dtype == dtype
            assert a.running_mean.dtype == torch.float32
        a, b = a.to(dtype), b.to(dtype)
        assert {n: t.dtype for n, t in a.state_dict().items()} == {
            n: t.dtype for n, t in b.state_dict().items()
        }
        y, z = a(x.to(dtype)), b(x.to(dtype))
    assert len(ran) == 1 + (dtype.itemsize == 2)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance)


def test_meta_device() -> None:
    module = nn.BatchNorm2d(5, device="meta", activation="relu")
    assert module(torch.empty(2, 5, 3, 3, device="meta")).shape == (2, 5, 3, 3)
    real = module.to_empty(device="cpu")
    real.reset_parameters()
    assert real.num_batches_tracked.item() == 0 and torch.equal(real.weight, torch.ones(5))


def test_a_trace_holds_nothing_of_the_checks() -> None:
    class Functional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return tritonnorm.functional.batch_norm(x, None, None, self.weight, training=True)

    graph = torch.fx.symbolic_trace(Functional()).graph
    kinds = [node.op for node in graph.nodes]
    assert kinds == ["placeholder", "get_attr", "call_function", "output"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fx_trace(activation: str) -> None:
    """A traced graph holds PyTorch's own operations, and computes the same."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3)
            self.bn = nn.BatchNorm2d(5, activation=activation)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    net = Net().eval()
    x = torch.randn(2, 3, 6, 6)
    leaf = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(leaf(x), net(x))

    class Inside(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, qualified_name: str) -> bool:
            return not isinstance(m, nn.BatchNorm2d) and super().is_leaf_module(m, qualified_name)

    graph = Inside().trace(net)
    assert any(node.target is torch.nn.functional.batch_norm for node in graph.nodes)
    torch.testing.assert_close(torch.fx.GraphModule(net, graph)(x), net(x))


def test_gradient_checkpointing() -> None:
    """A recomputed forward gives the same gradients, and moves the statistics again."""
    from torch.utils.checkpoint import checkpoint

    module = nn.BatchNorm2d(5, dtype=torch.float64, activation="relu")
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    (direct,) = torch.autograd.grad(module(x).sin().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).sin().sum(), x)
    assert torch.equal(direct, again)
    assert module.num_batches_tracked.item() == 3


def test_autocast() -> None:
    """As with torch's module: 16-bit activations meet fp32 parameters, and keep their dtype."""
    a, b = twins(nn.BatchNorm2d, torch.nn.BatchNorm2d, 5)
    conv = torch.nn.Conv2d(3, 5, 1)
    with torch.autocast("cpu", torch.bfloat16):
        x = conv(torch.randn(2, 3, 4, 4))
        assert x.dtype == torch.bfloat16
        y, z = a(x), b(x)
    assert y.dtype == z.dtype
    torch.testing.assert_close(y, z, rtol=0.02, atol=0.02)
