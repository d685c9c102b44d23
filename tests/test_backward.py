"""The backward: the matrix in Triton's interpreter, and gradients that meet."""

from __future__ import annotations

import pytest
import torch

from tests import cases, matrix
from tests.cases import Case, Way
from tritonnorm import functional, nn
from tritonnorm.plan import force_plan

TRAINING = {"activation": "relu", "residual": "contiguous"}


@pytest.mark.parametrize(("case", "way"), cases.one_way_each(cases.CASES, "backward"), ids=str)
def test_matrix(case: Case, way: Way) -> None:
    algorithm, tiles = way
    matrix.check(case, "cpu", algorithm, tiles=tiles)


@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 9, 3, 3), (9, 5)])
@pytest.mark.parametrize("there", ["split", "resident"])
def test_mask_does_not_depend_on_the_algorithm(shape: tuple[int, ...], there: str) -> None:
    """The forward of one algorithm and the backward of the other fit each other."""
    case = Case(shape, **TRAINING)
    data = matrix.build(case)
    back = "resident" if there == "split" else "split"

    def mixed(case: Case, d: matrix.Data) -> torch.Tensor:
        with force_plan(there, matrix.small_tiles(d.x)):
            return matrix.by_tritonnorm(case, d)

    with matrix.poisoned(), force_plan(back), matrix.ran() as ran:
        ours = matrix.results(mixed, case, data, gradients=True)
    assert ran == [there, back]
    matrix.compare(case, data, ours, matrix.results(matrix.by_torch, case, data, gradients=True))


def test_module_called_twice_before_backward() -> None:
    """Each call keeps statistics of its own; parameter gradients add up."""
    ours = nn.BatchNorm2d(3, dtype=torch.float64, activation="silu")
    torchs = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    first, second = (torch.randn(2, 3, 4, 5, dtype=torch.float64) * s + s for s in (1.0, 3.0))
    gradients = []
    for call in (ours, lambda x: torch.nn.functional.silu(torchs(x))):
        leaves = [t.clone().requires_grad_() for t in (first, second)]
        out = [call(t) for t in leaves]
        (out[0].square().sum() + out[1].sin().sum()).backward()
        gradients.append([t.grad for t in leaves])
    for g, h in zip(*gradients, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-10)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)
    for name, buffer in torchs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_one_tensor_as_input_and_residual(activation: str | None) -> None:
    """Both gradients reach it: y = act(bn(x) + x)."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = functional.batch_norm(x, None, None, training=True, activation=activation, residual=x)
    y.square().sum().backward()
    z = x.detach().clone().requires_grad_()
    v = torch.nn.functional.batch_norm(z, None, None, training=True) + z
    f = {None: lambda t: t, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[activation]
    f(v).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-10)


def test_gradient_accumulates() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    functional.batch_norm(x, None, None, training=True).sin().sum().backward()
    once = x.grad.clone()
    functional.batch_norm(x, None, None, training=True).sin().sum().backward()
    assert torch.equal(x.grad, 2 * once)


def test_backward_twice_needs_retain_graph() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = functional.batch_norm(x, None, None, training=True).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_input_changed_in_place_before_backward() -> None:
    """The backward recomputes from the input, so autograd must refuse one that has changed."""
    x = torch.randn(4, 3).requires_grad_()
    y = x * 1.0
    z = functional.batch_norm(y, None, None, training=True, activation="relu")
    y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_saves_neither_output_nor_pre_activation() -> None:
    """Kept for backward: the input, per-channel vectors, and one bit per element for a residual."""
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    residual = torch.randn(2, 4, 8, 8, requires_grad=True)
    sizes = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() != x.data_ptr():
            sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.batch_norm(x, None, None, training=True, activation="relu", residual=residual)
    assert max(sizes) == x.numel() // 8
