"""The operators of the masked batch norm: schema, fakes, gradients of any order, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tritonnorm
from bench.lab.traffic import trace
from tritonnorm.sequences import ops as _masked_ops  # noqa: F401  registers the operators
from tritonnorm.sequences.masked import masked_batch_norm

OPS = torch.ops.tritonnorm
KEEP = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.uint8)


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs() -> dict[str, Tensor]:
    return {
        "NCL": tensor(3, 5, 4),
        "NLC": tensor(3, 4, 5).mT,
        "slice": tensor(3, 9, 4)[:, 2:7],
        "NLC slice": tensor(3, 4, 9)[..., 2:7].mT,
        "other": tensor(4, 5, 3).permute(2, 1, 0),
        "expanded": tensor(1, 5, 4).expand(3, 5, 4),
    }


LAYOUTS = list(inputs())


def arguments(layout: str, op: str, full: bool = True) -> tuple[Any, ...]:
    x = inputs()[layout]
    w, b, mean, var = (tensor(5, seed=i) for i in range(1, 5))
    affine = (w, b) if full else (None, None)
    if op == "training":
        running = (mean, var.abs(), torch.tensor(2)) if full else (None,) * 3
        momentum = None if layout == "slice" else 0.1
        return (x, KEEP, *affine, *running, momentum, 1e-5, "relu", [])
    if op == "inference":
        return (x, KEEP, *affine, mean, var.abs(), 1e-5, "leaky_relu", [0.2], full)
    count = torch.tensor([4.0]) if full else None
    needs = [True, full, full]
    return (
        tensor(3, 5, 4, seed=7), x, KEEP, *affine, mean, var.abs(), count, "silu", [], needs,
    )  # fmt: skip


@pytest.mark.parametrize(("layout", "full"), [("NLC", True), ("slice", True), ("NCL", False)])
@pytest.mark.parametrize("op", ["training", "inference", "backward"])
def test_opcheck(op: str, layout: str, full: bool) -> None:
    operator = getattr(OPS, f"masked_batch_norm_{op}").default
    results = torch.library.opcheck(operator, arguments(layout, op, full))
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["training", "inference", "backward"])
def test_fake_strides_are_the_real_ones(op: str, layout: str) -> None:
    operator, sample = getattr(OPS, f"masked_batch_norm_{op}"), arguments(layout, op)
    real = operator(*sample)
    with FakeTensorMode() as mode:
        fake = operator(*[mode.from_tensor(t) if isinstance(t, Tensor) else t for t in sample])
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same(layout: str) -> None:
    sample = arguments(layout, "training")
    found = OPS.masked_batch_norm_training(*sample)
    y = OPS.masked_batch_norm_training(sample[0].contiguous(), *arguments(layout, "training")[1:])
    torch.testing.assert_close(found[0], y[0])
    torch.testing.assert_close(found[1:], y[1:])


def leaves(layout: str) -> tuple[Tensor, ...]:
    shape = (3, 4, 2) if layout == "NLC" else (3, 2, 4)
    made = (tensor(*shape), tensor(2, seed=1), tensor(2, seed=2))
    return tuple(t.double().requires_grad_() for t in made)


def function(layout: str, training: bool, activation: str | None) -> Any:
    mean, var = tensor(2, seed=3).double(), tensor(2, seed=4).double().abs() + 0.5

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return masked_batch_norm(
            x, None if training else mean, None if training else var, w, b, training,
            mask=KEEP.bool(), layout=layout, activation=activation,
        )  # fmt: skip

    return call


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training: bool, activation: str | None, layout: str) -> None:
    call = function(layout, training, activation)
    with trace() as seen:
        assert torch.autograd.gradcheck(call, leaves(layout), fast_mode=True)
    assert seen.launches
    assert torch.autograd.gradgradcheck(call, leaves(layout), fast_mode=True)


@pytest.mark.parametrize("needs", ["x", "w", "b", "xw", "wb"])
def test_only_the_gradients_asked_for(needs: str) -> None:
    call, made = function("NCL", True, "silu"), leaves("NCL")
    everything = dict(zip("xwb", torch.autograd.grad(call(*made).sum(), made), strict=True))
    fewer = [t.detach().requires_grad_(n in needs) for n, t in zip("xwb", made, strict=True)]
    wanted = [t for t in fewer if t.requires_grad]
    for n, g in zip(needs, torch.autograd.grad(call(*fewer).sum(), wanted), strict=True):
        torch.testing.assert_close(g, everything[n])


def test_the_same_bits_twice() -> None:
    x, lengths = tensor(7, 6, 50), torch.arange(7) * 7

    def once() -> tuple[Tensor, ...]:
        bn, leaf = tritonnorm.MaskedBatchNorm1d(6), x.clone().requires_grad_()
        y = bn(leaf, lengths=lengths)
        return y, *torch.autograd.grad(y.square().sum(), (leaf, bn.weight)), bn.running_var

    assert all(map(torch.equal, once(), once()))


# dynamo makes an instance of the function itself, and warns about it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    """One graph; forward, backward, running statistics and counter equal eager's."""
    torch._dynamo.reset()

    def step(bn: torch.nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        return bn(x, lengths=lengths).sin()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (3, 2):
        outcomes = []
        for f in (step, compiled):
            bn = tritonnorm.MaskedBatchNorm1d(5, layout="NLC", activation="relu")
            x = tensor(n, 4, 5).requires_grad_()
            with trace() as seen:
                y = f(bn, x, torch.arange(1, n + 1))
                grads = torch.autograd.grad(y.sum(), (x, bn.weight, bn.bias))
            assert "masked_gradient_kernel" in {launch.kernel for launch in seen.launches}
            outcomes.append((y.detach(), *grads, *bn.buffers()))
        for eager, graph in zip(*outcomes, strict=True):
            assert torch.equal(eager, graph) and eager.stride() == graph.stride()


def test_autograd_knows_what_moved() -> None:
    sample = arguments("NCL", "training")
    before = [t._version if isinstance(t, Tensor) else None for t in sample]
    OPS.masked_batch_norm_training(*sample)
    for i, (t, version) in enumerate(zip(sample, before, strict=True)):
        if isinstance(t, Tensor):
            assert (t._version > version) == (4 <= i <= 6), i


def test_a_transform_takes_the_operations_of_pytorch() -> None:
    """torch.func sees no kernel, and the same gradient."""
    call, made = function("NCL", True, None), leaves("NCL")
    with trace() as seen:
        (found,) = torch.func.jacrev(lambda x: call(x, *made[1:]).square().sum(), argnums=(0,))(
            made[0]
        )
    assert not seen.launches
    (expected,) = torch.autograd.grad(call(*made).square().sum(), made[:1])
    torch.testing.assert_close(found, expected)
