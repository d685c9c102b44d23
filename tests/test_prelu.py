"""A learned slope: the function, its gradient of any order, and what `replace` makes of nn.PReLU.

The kernels themselves run in the matrix (`tests.cases.OF_SLOPE`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tritonnorm
from tests.fold_models import Net, bn, conv
from tests.test_fusing import image, rules, steps_alike
from tritonnorm import functional
from tritonnorm import ops as _ops  # noqa: F401  registers torch.ops.tritonnorm
from tritonnorm.activation import resolve
from tritonnorm.plan import force_plan
from tritonnorm.replace import replace, restore

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def leaves(slopes: int, residual: bool = False) -> list[Any]:
    """x, slope, weight, bias, residual in float64."""
    torch.manual_seed(0)
    sizes: list[Any] = [(2, 3, 4, 5), (slopes,), (3,), (3,), (2, 3, 4, 5) if residual else None]
    return [s and torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]


def ours(x: Tensor, slope: Any, weight: Any, bias: Any, residual: Any, **options: Any) -> Tensor:
    return functional.batch_norm(
        x, None, None, weight, bias, True, activation="prelu", slope=slope, residual=residual,
        **options,
    )  # fmt: skip


def by_hand(x: Tensor, slope: Tensor, weight: Any, bias: Any, residual: Any) -> Tensor:
    v = F.batch_norm(x, None, None, weight, bias, True)
    return F.prelu(v if residual is None else v + residual, slope)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("slopes", [1, 3])
def test_derivatives_of_derivatives(slopes: int, residual: bool) -> None:
    found = []
    for function in (ours, by_hand):
        given = leaves(slopes, residual)
        wanted = [t for t in given if t is not None]
        first = torch.autograd.grad(function(*given).sin().sum(), wanted, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(total, wanted)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_gradcheck() -> None:
    given = leaves(3, True)
    assert torch.autograd.gradcheck(ours, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, given, fast_mode=True)


@pytest.mark.parametrize(("shared", "residual"), [(False, True), (True, False)])
def test_opcheck(shared: bool, residual: bool) -> None:
    ops = torch.ops.tritonnorm
    x, dy, z = (torch.randn(3, 5, 2, 4) for _ in range(3))
    slope, distance = torch.rand(1 if shared else 5), [float(not shared)]
    weight, bias, mean, var = torch.rand(4, 5) + 0.5
    added = z if residual else None
    running, counter = (mean, var), torch.tensor(2)
    common = ("prelu", distance)
    training = (x, added, weight, bias, *running, counter, 0.1, 1e-5, *common, False, slope)
    inference = (x, added, weight, bias, *running, 1e-5, *common, True, False, slope)
    _, mean, rstd, _ = ops.batch_norm_inference(*inference)
    backward = (dy, x, added, None, weight, bias, mean, rstd, True, *common)
    for op, sample in (
        (ops.batch_norm_training, training),
        (ops.batch_norm_inference, inference),
        (ops.batch_norm_backward, (*backward, [True, residual, True, True, True], slope)),
    ):
        found = torch.library.opcheck(op.default, sample)
        assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("algorithm", ["resident", "split"])
def test_at_zero_the_gradient_takes_the_slope(algorithm: str) -> None:
    """As PyTorch's does: only v > 0 lets all of it through."""
    x = torch.tensor([[[-1.0, 0.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    z = torch.zeros_like(x, requires_grad=True)
    slope = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    with force_plan(algorithm):
        y = functional.batch_norm(
            x, None, None, training=True, activation="prelu", slope=slope, residual=z
        )
        dz, dslope = torch.autograd.grad(y.sum(), [z, slope])
    assert dz.flatten().tolist() == [0.25, 0.25, 1.0]
    assert float(dslope) == pytest.approx(-(1.5**0.5), rel=1e-4)


def test_the_fallback_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for disabled in (False, True):
        monkeypatch.setenv("TRITONNORM_DISABLE", str(int(disabled)))
        given = leaves(1, True)
        y = ours(*given)
        found.append([y, *torch.autograd.grad(y.sin().sum(), given)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    narrow = torch.randn(2, 3, 4).bfloat16()
    assert ours(narrow, torch.rand(3), None, None, None).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("slope: expected a tensor", {"activation": "prelu"}),
        ("slope: expected a tensor", {"activation": "prelu", "slope": 0.25}),
        ("slope: expected 1 or 3 elements", {"activation": "prelu", "slope": torch.ones(2)}),
        ("slope: expected 1 or 3 elements", {"activation": "prelu", "slope": torch.ones(3, 1)}),
        ("floating-point", {"activation": "prelu", "slope": torch.ones(3, dtype=torch.int64)}),
        ("expected None unless", {"activation": "relu", "slope": torch.ones(3)}),
        (
            "expected none for prelu",
            {"activation": "prelu", "slope": torch.ones(3), "activation_args": (0.1,)},
        ),
        ("slope: expected on", {"activation": "prelu", "slope": torch.ones(3, device="meta")}),
    ],
)  # fmt: skip
def test_refused(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        functional.batch_norm(torch.randn(2, 3, 4), None, None, training=True, **options)


def test_what_names_an_activation_alone_points_to_the_function() -> None:
    for make in (
        lambda: tritonnorm.BatchNorm2d(3, activation="prelu"),
        lambda: tritonnorm.GroupNorm(1, 3, activation="prelu"),
        lambda: resolve("prelu"),
    ):
        with pytest.raises(ValueError, match=r"functional.batch_norm.*slope"):
            make()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph() -> None:
    given = leaves(1)
    fast = torch.compile(ours, backend="aot_eager", fullgraph=True)
    wanted = [t for t in given if t is not None]
    expected = torch.autograd.grad(ours(*given).sin().sum(), wanted)
    for a, b in zip(torch.autograd.grad(fast(*given).sin().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# replace


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")


ADDS: list[Callable[..., Tensor]] = [
    lambda m, x: m.p(m.b(m.c(x)) + x),
    lambda m, x: F.prelu(x + m.b(m.c(x)), m.p.weight),
    lambda m, x: m.p(m.b(m.c(x)).add_(x)),
]


@pytest.mark.parametrize("slopes", [1, 4])
@pytest.mark.parametrize("run", ADDS)
@pytest.mark.usefixtures("without_kernels")
def test_replace_with_an_addition(run: Any, slopes: int) -> None:
    model = Net(run, b=bn(4), c=conv(4, 4), p=nn.PReLU(slopes))
    assert rules(model, example_inputs=image()) == {"b": "bn -> add -> prelu"}


def sequence(slopes: int = 4) -> nn.Sequential:
    return nn.Sequential(conv(4, 4), bn(4), nn.PReLU(slopes))


def test_one_call_computes_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels: the gradients of the model's own parameters, and no prelu of PyTorch."""
    model = sequence().double()
    theirs, names = copy.deepcopy(model), list(model.state_dict())
    slope = model[2].weight
    replace(model)
    assert list(model.state_dict()) == names and model[2].weight is slope
    calls: list[Any] = []
    torchs = F.prelu
    monkeypatch.setattr(F, "prelu", lambda *a: calls.append(a) or torchs(*a))
    steps_alike(model, theirs, image())
    assert len(calls) == 2  # both modes of the original; nn.PReLU calls it
    restore(model)
    monkeypatch.undo()
    steps_alike(model, theirs, image())


@pytest.mark.usefixtures("without_kernels")
def test_the_slope_is_read_in_every_call() -> None:
    model = sequence().double()
    theirs = copy.deepcopy(model)
    replace(model)
    with torch.no_grad():
        for each in (model, theirs):
            each[2].weight.fill_(-3.0)
    steps_alike(model, theirs, image())
    for each in (model, theirs):
        each[2].weight = nn.Parameter(torch.full((1,), 0.7, dtype=torch.float64))
    steps_alike(model, theirs, image())
    model.load_state_dict({k: v + 1 for k, v in theirs.state_dict().items()})
    theirs.load_state_dict(model.state_dict())
    steps_alike(model, theirs, image())


@pytest.mark.usefixtures("without_kernels")
def test_hooks_and_parametrizations() -> None:
    def row(model: nn.Module) -> Any:
        return replace(model)[1].rows[0]

    hooked = sequence()
    hooked[2].register_forward_hook(lambda *_: None)
    assert "hook" in row(hooked).reason and row(hooked).decision != "fused"
    changed = sequence()
    parametrize.register_parametrization(changed[2], "weight", nn.Softplus())
    assert "another class" in row(changed).reason

    later = sequence().double()
    replace(later)
    seen: list[Tensor] = []
    later[2].register_forward_hook(lambda _m, _i, y: seen.append(y))
    y = later(image())
    assert len(seen) == 1 and seen[0] is y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_mixed_dtypes_do_as_torch(dtype: torch.dtype) -> None:
    """Under autocast torch's prelu computes in the lower dtype; without it mixed dtypes raise."""
    model = nn.Sequential(bn(4), nn.PReLU(4))
    theirs, x = copy.deepcopy(model), torch.randn(2, 4, 5, 5).to(dtype)
    replace(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = model(x), theirs(x)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y, z, rtol=2**-7, atol=2**-7)
    if dtype == torch.bfloat16:
        for each in (model, theirs):
            with pytest.raises(RuntimeError, match="Type promoting"):
                each(x)


@pytest.mark.usefixtures("without_kernels")
def test_with_statistics_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collectives know no third sum: torch's prelu follows."""
    from tritonnorm.sync import nn as sync

    class Ranks:
        group_name = "two"

        @staticmethod
        def size() -> int:
            return 2

    def alone(x: Tensor, *args: Any) -> Tensor:
        mean, var, weight, bias, momentum, eps = args[:6]
        args[-1].add_(1)
        return F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)

    model = sequence().double()
    theirs = copy.deepcopy(model)
    replace(model)
    tritonnorm.convert_sync_batchnorm(model)
    steps_alike(model, theirs, image())  # no group
    monkeypatch.setattr(sync._Synchronized, "_group", lambda self: Ranks)
    monkeypatch.setattr(sync, "sync_batch_norm", alone)
    steps_alike(model, theirs, image())


@pytest.mark.usefixtures("without_kernels")
def test_a_wrong_number_of_slopes_raises_as_torch() -> None:
    model = nn.Sequential(bn(4), nn.PReLU(3))
    replace(model)
    with pytest.raises(RuntimeError, match="Found parameter numbers = 3"):
        model(torch.randn(2, 4, 5, 5))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_fused_model_compiles() -> None:
    model = sequence().double()
    replace(model)
    x = image()
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, **CLOSE)
