"""The operators of group norms: schema, fakes, autograd, torch.compile, derivatives of
derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import cases, norms
from tests.test_ops import LAYOUTS, opcheck, tensor
from tritonnorm import functional
from tritonnorm.norms import ops as _ops  # noqa: F401  registers torch.ops.tritonnorm

OPS = torch.ops.tritonnorm


def sample(shape: tuple[int, ...], layout: str, groups: int, **options: Any) -> tuple[Any, ...]:
    """Arguments of group_norm."""
    c = options.get("c", shape[1])
    with_parts = options.get("full", True)
    return (
        cases.LAYOUTS[layout](tensor(*shape)),
        tensor(*shape, seed=1) if options.get("residual") else None,
        tensor(c, seed=2) if with_parts else None,
        tensor(c, seed=3) if with_parts else None,
        groups,
        options.get("centred", True),
        1e-5,
        options.get("activation", ""),
        options.get("args", []),
        options.get("size", 0),
    )


SAMPLES = [
    sample((2, 6, 2, 4), "contiguous", 3),
    sample((2, 4, 2, 3), "channels_last", 2, residual=True, activation="silu"),
    sample((2, 4, 2, 3), "crop", 4, activation="leaky_relu", args=[0.2]),
    sample((6, 5), "contiguous", 1, full=False, residual=True, activation="gelu", centred=False),
    sample((2, 3, 4), "contiguous", 1, c=4, size=4, residual=True, activation="silu"),
    sample((2, 3, 4), "batch_inner", 1, c=4, size=4, residual=True, centred=False),
]


def backward_sample(needs: list[bool], *arguments: Any) -> tuple[Any, ...]:
    """Arguments of group_norm_backward after the forward of a sample."""
    x, residual, weight, bias, groups, centred, _, activation, args, size = arguments
    _, mean, rstd = OPS.group_norm(*arguments)
    kept = residual if activation else None
    return (
        tensor(*x.shape, seed=8), x, kept, weight, bias, mean, rstd, groups, centred,
        activation, args, needs, size,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", SAMPLES, ids=range(len(SAMPLES)))
def test_opcheck(arguments: tuple[Any, ...]) -> None:
    opcheck(OPS.group_norm, arguments)


@pytest.mark.parametrize("arguments", SAMPLES, ids=range(len(SAMPLES)))
@pytest.mark.parametrize("needs", [[True] * 4, [False, True, True, False], [False] * 4])
def test_opcheck_backward(arguments: tuple[Any, ...], needs: list[bool]) -> None:
    needs = [n and (i < 2 or arguments[i] is not None) for i, n in enumerate(needs)]
    opcheck(OPS.group_norm_backward, backward_sample(needs, *arguments))


def test_opcheck_update() -> None:
    vectors = (tensor(3), tensor(3, seed=1).abs(), tensor(6), tensor(6, seed=2).abs() + 1.0)
    opcheck(OPS.instance_norm_update, (*vectors, 4, 0.1, 1e-5))


@pytest.mark.parametrize("layout", [*LAYOUTS, "batch_inner"])
@pytest.mark.parametrize(("groups", "c", "size"), [(2, 4, 0), (1, 3, 3)])
def test_fake_strides_are_the_real_ones(layout: str, groups: int, c: int, size: int) -> None:
    arguments = sample(
        (3, 4, 2, 3), layout, groups, c=c, size=size, residual=True, activation="relu"
    )
    for op, given in (
        (OPS.group_norm, arguments),
        (OPS.group_norm_backward, backward_sample([True] * 4, *arguments)),
    ):
        real = op(*given)
        with FakeTensorMode() as mode:
            fake = op(*[mode.from_tensor(t) if isinstance(t, Tensor) else t for t in given])
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "smooth": {"activation": "silu"},
    "two_valued": {"activation": "leaky_relu", "activation_args": (0.3,)},
}
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "group": (lambda x, w, b, **o: functional.group_norm(x, 2, w, b, **o), (2, 4, 3)),
    "instance": (lambda x, w, b, **o: functional.instance_norm(
        x, weight=w, bias=b, **o), (2, 2, 3, 2)),
    "layer": (lambda x, w, b, **o: functional.layer_norm(x, (4,), w, b, **o), (3, 4)),
    "rms": (lambda x, w, b, **o: functional.rms_norm(x, (4,), w, 1e-3, **o), (3, 4)),
}  # fmt: skip


def differentiable(
    norm: str, residual: bool, kind: str
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A call as a function of its tensors in float64."""
    function, shape = FUNCTIONS[norm]
    c = shape[1]
    leaves = [
        tensor(*shape, dtype=torch.float64),
        tensor(c, seed=2, dtype=torch.float64).abs() + 0.5,
        tensor(c, seed=3, dtype=torch.float64),
        3.0 * tensor(*shape, seed=1, dtype=torch.float64),
    ]
    if norm == "rms":
        leaves[2] = leaves[2][:0]

    def call(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
        y = function(x, weight, bias, residual=z if residual else None, **OPTIONS[kind])
        return y if residual else y + 0.0 * z

    return call, tuple(t.detach().requires_grad_() for t in leaves)


@pytest.mark.parametrize(
    ("kind", "residual"), [("none", True), ("smooth", False), ("two_valued", True)]
)
@pytest.mark.parametrize("norm", FUNCTIONS)
def test_gradcheck(norm: str, residual: bool, kind: str) -> None:
    call, leaves = differentiable(norm, residual, kind)
    if norm == "rms":
        leaves = (leaves[0], leaves[1], leaves[2].detach(), leaves[3])
    with norms.ran() as ran:
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert ran


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("norm", FUNCTIONS)
def test_gradgradcheck(norm: str, kind: str) -> None:
    call, leaves = differentiable(norm, True, kind)
    if norm == "rms":
        leaves = (leaves[0], leaves[1], leaves[2].detach(), leaves[3])
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_create_graph_gives_the_kernels_gradients() -> None:
    """The differentiable formula and the kernels are the same function."""
    for norm in ("group", "layer"):
        call, leaves = differentiable(norm, True, "smooth")
        dy = tensor(*leaves[0].shape, seed=9, dtype=torch.float64)
        kernels = torch.autograd.grad(call(*leaves), leaves, dy)
        formula = torch.autograd.grad(call(*leaves), leaves, dy, create_graph=True)
        for k, f in zip(kernels, formula, strict=True):
            torch.testing.assert_close(k, f.detach(), rtol=1e-10, atol=1e-10)


# dynamo makes an instance of the function itself, and warns about it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    """One graph; forward, backward and running statistics equal eager's."""
    torch._dynamo.reset()

    def step(x: Tensor, z: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = functional.group_norm(x, 2, weight, activation="silu", residual=z)
        y = functional.instance_norm(y, mean, var)
        return functional.layer_norm(y, y.shape[-1:]) + functional.rms_norm(z, z.shape[-2:])

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (3, 2):
        outcomes = []
        for f in (step, compiled):
            x = tensor(n, 4, 2, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
            z = tensor(n, 4, 2, 3, seed=1).requires_grad_()
            weight = tensor(4, seed=2).requires_grad_()
            mean, var = torch.zeros(4), torch.ones(4)
            with norms.ran() as ran:
                y = f(x, z, weight, mean, var)
                grads = torch.autograd.grad(y.sin().sum(), (x, z, weight))
            assert len(ran) == 8
            outcomes.append((y.detach(), mean, var, *grads))
        for eager, graph in zip(*outcomes, strict=True):
            assert torch.equal(eager, graph)
            assert eager.stride() == graph.stride()
