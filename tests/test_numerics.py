"""Numbers that are hard on a batch norm: large means, constants, NaN and infinity."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from tests import cases, matrix
from tests.cases import Case
from tritonnorm import functional, nn, reference
from tritonnorm.kernels.base import Config
from tritonnorm.plan import force_plan

ALGORITHMS = ("split", "resident")
LAYOUTS = ("contiguous", "channels_last")


def forced(algorithm: str, x: Tensor) -> contextlib.AbstractContextManager[None]:
    """The algorithm with tiles so small that partial results are merged."""
    return force_plan(algorithm, matrix.small_tiles(x))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_mean(algorithm: str, layout: str) -> None:
    """Mean 1e4, std 1: E[x^2] - E[x]^2 would leave no digit of the variance in fp32."""
    generator = torch.Generator().manual_seed(0)
    x = cases.LAYOUTS[layout](torch.randn(4, 5, 6, 8, generator=generator) + 1e4)
    mean, var = torch.zeros(5), torch.zeros(5)
    with forced(algorithm, x):
        y = functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    exact = reference.forward(x, training=True)
    count = x.numel() / 5
    ulp = torch.finfo(torch.float32).eps
    # Sums are of x less a value of the channel: the mean is rounded once, to half an ulp, and
    # x - mean is exact but for that. The variance has no part in it.
    assert (mean - exact.mean).abs().max() <= 0.5 * 1e4 * ulp
    assert (y - exact.y).abs().max() <= 0.5 * 1e4 * ulp / float(exact.var.min().sqrt()) + 10 * ulp
    assert (var - exact.var * count / (count - 1)).abs().max() <= 20 * ulp


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_large_mean_backward(algorithm: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(4, 3, 6, 8, generator=generator) + 1e4).requires_grad_()
    dy = torch.randn(4, 3, 6, 8, generator=generator)
    with forced(algorithm, x):
        y = functional.batch_norm(x, None, None, training=True)
        (dx,) = torch.autograd.grad(y, x, dy)
    f = reference.forward(x.detach(), training=True)
    exact = reference.backward(dy, x.detach(), f.mean, f.var)
    assert (dx - exact.dx).abs().max() <= 2 * 1e4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e4, 1e-30])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_constant_channel(algorithm: str, value: float) -> None:
    """Variance 0: the output is the bias, up to the rounding of the mean divided by sqrt(eps)."""
    x = torch.randn(3, 3, 4, 5)
    x[:, 1] = value
    bias, var = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    with forced(algorithm, x):
        y = functional.batch_norm(x, torch.zeros(3), var, None, bias, True, 1.0)
    error = 2 * abs(value) * torch.finfo(torch.float32).eps
    assert (y[:, 1] - 2.0).abs().max() <= error / 1e-5**0.5
    assert 0.0 <= float(var[1]) <= error**2
    exact = reference.forward(x, bias=bias, training=True).y
    torch.testing.assert_close(y[:, 0].double(), exact[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "layout", "bad"),
    [
        ("split", "contiguous", float("nan")),
        ("split", "channels_last", float("inf")),
        ("resident", "contiguous", -float("inf")),
        ("resident", "channels_last", float("nan")),
    ],
)
@pytest.mark.parametrize("place", ["x", "dy", "residual"])
def test_one_channel_does_not_touch_another(
    algorithm: str, layout: str, bad: float, place: str
) -> None:
    """A NaN or an infinity in channel 2 leaves the bits of all other channels as they were."""
    case = Case((3, 9, 4, 5), layout, activation="relu", residual=layout, grad=layout)
    clean, dirty = matrix.build(case), matrix.build(case)
    getattr(dirty, place)[1, 2, 3, 1] = bad
    others = [c for c in range(9) if c != 2]
    with forced(algorithm, clean.x):
        a, b = (
            matrix.results(matrix.by_tritonnorm, case, d, gradients=True) for d in (clean, dirty)
        )
    for name in ("y", "dx", "dresidual"):
        assert torch.equal(a[name][:, others], b[name][:, others]), name
    for name in ("dweight", "dbias", "running_mean", "running_var"):
        assert torch.equal(a[name][others], b[name][others]), name


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("place", "bad"),
    [("x", NAN), ("x", INF), ("x", -INF), ("dy", NAN), ("dy", INF), ("residual", NAN),
     ("residual", -INF), ("weight", NAN), ("bias", NAN), ("bias", INF)],
)  # fmt: skip
def test_nan_and_infinity_propagate_as_in_torch(algorithm: str, bad: float, place: str) -> None:
    """The same elements of every result are NaN, or infinite with the same sign.

    But for an infinite weight: PyTorch computes x * a + b on a CPU, where a and b are infinite, and
    so makes NaN of what is infinite here.
    """
    case = Case((3, 5, 4, 6), activation="leaky_relu", residual="contiguous")
    data = matrix.build(case)
    t = getattr(data, place)
    t.view(-1)[t.numel() // 2] = bad
    with forced(algorithm, data.x):
        ours = matrix.results(matrix.by_tritonnorm, case, data, gradients=True)
    torchs = matrix.results(matrix.by_torch, case, data, gradients=True)
    for name, theirs in torchs.items():
        mine = ours[name]
        assert torch.equal(mine.isfinite(), theirs.isfinite()), name
        assert torch.equal(mine.isnan(), theirs.isnan()), name
        infinite = theirs.isinf()
        assert torch.equal(mine[infinite], theirs[infinite]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu", "hardswish"])
def test_nan_and_infinity_in_inference(activation: str, bad: float) -> None:
    """With given statistics one element stays one element."""
    case = Case((2, 5, 3, 4), activation=activation, training=False)
    data = matrix.build(case)
    data.x[1, 2, 1, 3] = bad
    ours = matrix.results(matrix.by_tritonnorm, case, data, gradients=False)["y"]
    torchs = matrix.results(matrix.by_torch, case, data, gradients=False)["y"]
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_twice(algorithm: str, layout: str) -> None:
    case = Case((5, 9, 3, 7), layout, torch.bfloat16, torch.float32, "silu", residual="contiguous")
    data = matrix.build(case)
    with forced(algorithm, data.x):
        a, b = (matrix.results(matrix.by_tritonnorm, case, data, gradients=True) for _ in range(2))
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics_over_batches(momentum: float | None) -> None:
    """Four batches of different sizes, against torch's module, buffer by buffer."""
    ours = nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64)
    torchs = torch.nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64)
    for step, n in enumerate((2, 5, 1, 3)):
        x = torch.randn(n, 5, 3, 4, dtype=torch.float64) * (step + 1) + step
        with force_plan(ALGORITHMS[step % 2]):
            ours(x)
        torchs(x)
        for name, buffer in torchs.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
    assert ours.num_batches_tracked.item() == 4


@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1e4, 1e15])
def test_scales(scale: float) -> None:
    """Squares of the input neither overflow nor vanish where eps or fp32 still allow an answer."""
    x = torch.randn(4, 3, 5, 5) * scale
    y = functional.batch_norm(x, None, None, training=True)
    exact = reference.forward(x, training=True).y
    assert (y - exact).abs().max() <= 1e-5 * max(1.0, float(exact.abs().max()))


def test_two_values_per_channel() -> None:
    """The smallest batch: outputs are +-1 up to eps, and the input's gradient all but vanishes."""
    x = torch.tensor([[1.0, -2.0], [3.0, 5.0]], dtype=torch.float64, requires_grad=True)
    y = functional.batch_norm(x, None, None, training=True, eps=1e-12)
    torch.testing.assert_close(y.abs(), torch.ones_like(y), rtol=1e-10, atol=0.0)
    (dx,) = torch.autograd.grad(y, x, torch.randn(2, 2, dtype=torch.float64))
    assert dx.abs().max() <= 1e-10


@pytest.mark.parametrize("apart, rest, spread", [(-0.7, 0.1, 0.0), (0.0, 1000.0, 1.0)])
def test_a_first_tile_that_lies_apart(apart: float, rest: float, spread: float) -> None:
    """130 tiles of a program: with one pivot for them all, 5e-4 of the variance were lost."""
    generator = torch.Generator().manual_seed(0)
    x = rest + spread * torch.randn(1, 1, 130 * 64, generator=generator)
    x[..., :64] = apart
    mean, var = torch.zeros(1), torch.zeros(1)
    with force_plan("split", Config(1, 1, 64, splits=1)):
        functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    exact = x.double().var()
    assert float((var - exact).abs() / exact) <= 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_variance_that_overflows(layout: str) -> None:
    """Infinity, so the output is the bias; and not NaN, as long as sums are finite."""
    generator = torch.Generator().manual_seed(0)
    x = cases.LAYOUTS[layout](1e22 * torch.randn(4, 5, 6, 8, generator=generator))
    mean, var = torch.zeros(5), torch.zeros(5)
    with forced("split", x):
        y = functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert torch.isinf(var).all() and (y == 0).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_slope_that_overflows_where_no_element_is(algorithm: str) -> None:
    """A constant channel of 2^58: 0 is so far from its mean that the slope of gelu is infinite."""
    x = torch.full((3, 3, 5, 7), 2.0**58, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    with forced(algorithm, x):
        y = functional.batch_norm(
            x, None, None, torch.ones(3), bias, training=True, activation="gelu_tanh"
        )
        (dbias,) = torch.autograd.grad(y.sum(), bias)
    assert torch.allclose(dbias, torch.full((3,), 0.5 * 105))


@pytest.mark.parametrize("name, at", [("sigmoid", 10.0), ("sigmoid", 14.0), ("mish", -9e37)])
def test_slopes_in_the_tails(name: str, at: float) -> None:
    """Digits of a slope that is nearly 0, where 1 - sigmoid cancels and 4 v overflows."""
    x = torch.full((2, 3, 4), at, requires_grad=True)
    y = functional.batch_norm(x, torch.zeros(3), torch.ones(3), eps=0.0, activation=name)
    (dx,) = torch.autograd.grad(y.sum(), x)
    v = x.detach().double().requires_grad_()
    apply = torch.sigmoid if name == "sigmoid" else torch.nn.functional.mish
    (exact,) = torch.autograd.grad(apply(v).sum(), v)
    assert torch.allclose(dx.double(), exact, rtol=1e-5, atol=0.0)
