"""Every epilogue as a device function: values, gradients, boundaries, NaN and infinity."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonnorm.activation import ACTIVATIONS, resolve
from tritonnorm.kernels._epilogue import EPILOGUES, activate, activation_gradient
from tritonnorm.kernels.base import EpilogueArguments
from tritonnorm.reference import EXACT

NAN, INF = math.nan, math.inf
#: Kinks of all activations, zeros of both signs, subnormals, ends of the range.
BOUNDARIES = (
    0.0,
    -0.0,
    3.0,
    -3.0,
    6.0,
    -6.0,
    0.5,
    -0.5,
    1.0,
    -1.0,
    20.0,
    -20.0,
    2.5,
    5.0,
    88.0,
    -88.0,
)
EXTREMES = (1e-300, -1e-300, 1e-40, -1e-40, 1e-7, -1e-7, 1e4, -1e4, 1e30, -1e30, INF, -INF, NAN)

PARAMETERS = [
    ("leaky_relu", (0.2,)), ("leaky_relu", (-0.5,)), ("leaky_relu", (0.0,)), ("elu", (0.5,)),
    ("elu", (2.0,)), ("softplus", (2.0,)), ("softplus", (0.5, 3.0)),
    *((name, ()) for name in ACTIVATIONS),
]  # fmt: skip


@triton.jit
def epilogue_kernel(
    v_ptr,  # [M] pre-activation
    dy_ptr,  # [M] upstream gradient
    y_ptr,  # [M] out
    g_ptr,  # [M] out
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    GATE: tl.constexpr,
    GATED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
):
    """Value and gradient of an epilogue, element by element."""
    i = tl.arange(0, M)
    v = tl.load(v_ptr + i)
    g = tl.load(dy_ptr + i)
    tl.store(y_ptr + i, activate(v, ACT, A, B))
    tl.store(g_ptr + i, activation_gradient(v, g, True, GRADIENT, GATE, GATED, A, B))


def points(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """1024 pre-activations: a fine grid, the boundaries and their neighbours, the extremes."""
    edges = torch.tensor(BOUNDARIES, dtype=dtype)
    infinity = torch.full_like(edges, INF)
    special = torch.cat(
        [
            edges,
            torch.nextafter(edges, infinity),
            torch.nextafter(edges, -infinity),
            torch.tensor(EXTREMES, dtype=torch.float64).to(dtype),
        ]
    )
    return torch.cat([special, torch.linspace(-30, 30, 1024 - len(special), dtype=dtype)]).to(
        device
    )


def by_kernel(name: str, args: tuple[float, ...], v: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient by the device functions."""
    _, complete = resolve(name, args)
    arguments = EpilogueArguments.named(name, complete)
    y, g = torch.full_like(v, NAN), torch.full_like(v, NAN)
    options = arguments.forward() | arguments.backward()
    epilogue_kernel[(1,)](v, dy, y, g, **options, M=v.numel())
    return y, g


def by_torch(
    name: str, args: tuple[float, ...], v: Tensor, dy: Tensor, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Value and gradient by PyTorch; ``exact`` by the specification where it differs."""
    leaf = v.clone().requires_grad_()
    found, complete = resolve(name, args)
    assert found is not None
    y = (EXACT.get(name, found.function) if exact else found.function)(leaf, *complete)
    (g,) = torch.autograd.grad(y, leaf, dy)
    return y.detach(), g


def check_activation(
    name: str, args: tuple[float, ...], dtype: torch.dtype, device: str = "cpu"
) -> None:
    """fp64: within 1e-12 of PyTorch. fp32: twice PyTorch's own error, plus 4 ulp."""
    v = points(dtype, device)
    dy = torch.linspace(0.5, 1.5, v.numel(), dtype=dtype, device=device)
    exact = by_torch(name, args, v.double(), dy.double(), exact=True)
    ours, torchs = by_kernel(name, args, v, dy), by_torch(name, args, v, dy)
    for what, mine, theirs, value in zip(("value", "gradient"), ours, torchs, exact, strict=True):
        if name == "relu6" and what == "gradient":  # PyTorch's own kernels disagree at NaN: dy or 0
            theirs = torch.where(v.isnan(), dy, theirs)
            value = torch.where(v.isnan(), dy.double(), value)
        # oneDNN's gelu of infinity is NaN on CPUs with AVX-512.
        theirs = torch.where(theirs.isnan() & (mine == value.to(dtype)), mine, theirs)
        odd = ~theirs.isfinite()
        same = (mine == theirs) | (mine.isnan() & theirs.isnan())
        assert same[odd].all(), (
            f"{what} at {v[odd & ~same]}: {mine[odd & ~same]}, {theirs[odd & ~same]}"
        )
        scale = value.abs().clamp(min=1.0)
        error = (mine.double() - value).abs() / scale
        if dtype == torch.float64:
            allowed = torch.full_like(error, 1e-12)
        else:
            allowed = 2 * (theirs.double() - value).abs() / scale + 4 * torch.finfo(dtype).eps
        wrong = ~odd & ~(error <= allowed)
        assert not wrong.any(), f"{what} at {v[wrong]}: {mine[wrong]}, PyTorch {theirs[wrong]}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "args"), PARAMETERS)
def test_epilogue(name: str, args: tuple[float, ...], dtype: torch.dtype) -> None:
    check_activation(name, args, dtype)


@pytest.mark.parametrize(
    ("name", "at", "slope"),
    [
        ("relu", 0.0, 0.0), ("relu", -0.0, 0.0), ("relu6", 0.0, 0.0), ("relu6", 6.0, 0.0),
        ("leaky_relu", 0.0, 0.01), ("hardswish", -3.0, 0.0), ("hardswish", 3.0, 1.0),
        ("hardsigmoid", -3.0, 0.0), ("hardsigmoid", 3.0, 0.0), ("elu", 0.0, 1.0),
        ("softplus", 20.0, 1.0),
    ],
)  # fmt: skip
def test_slope_at_a_boundary(name: str, at: float, slope: float) -> None:
    """Exactly at a kink, to the bit, and as PyTorch has it."""
    v, dy = torch.full((16,), at, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    _, g = by_kernel(name, (), v, dy)
    _, theirs = by_torch(name, (), v, dy, exact=True)
    tolerance = 1e-8 if name == "softplus" else 0.0
    assert (g - theirs).abs().max() <= 1e-15
    assert abs(float(g[0]) - slope) <= tolerance


def test_names_agree() -> None:
    assert set(ACTIVATIONS) == set(EPILOGUES)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kinds_agree(name: str) -> None:
    """Two-valued here means a gate there; `slopes` are the two values."""
    epilogue, activation = EPILOGUES[name], ACTIVATIONS[name]
    assert (epilogue.gate is not None) == activation.two_valued == (epilogue.gated is not None)
    assert (epilogue.gradient is None) == activation.two_valued
    if activation.slopes is not None:
        _, args = resolve(name)
        v = points(torch.float64)
        v = v[v.isfinite()]
        _, g = by_torch(name, (), v, torch.ones_like(v), exact=True)
        expected = torch.tensor(sorted(activation.slopes(*args)), dtype=torch.float64)
        torch.testing.assert_close(g.unique(), expected, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_module_is_the_function(name: str) -> None:
    activation, (_, args) = ACTIVATIONS[name], resolve(name)
    v = torch.linspace(-7, 7, 64)
    assert torch.equal(activation.module(*args)(v), activation.function(v, *args))


def test_resolve() -> None:
    for nothing in (None, "none", "identity"):
        assert resolve(nothing) == (None, ())
    assert resolve("softplus", (2,)) == (ACTIVATIONS["softplus"], (2.0, 20.0))
    for name, args, text in (
        ("swish", (), "activation: expected"),
        (3, (), "activation: expected"),
        ("relu", (1.0,), "activation_args: relu takes 0"),
        ("leaky_relu", ("a",), "activation_args: expected numbers"),
        (None, (1.0,), "activation_args: expected none"),
    ):
        with pytest.raises(ValueError, match=text):
            resolve(name, args)  # type: ignore[arg-type]
