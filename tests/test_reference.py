"""The specification itself, against PyTorch's autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tritonnorm import reference
from tritonnorm.activation import ACTIVATIONS, resolve

SHAPES = [(7, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2)]


def tensors(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    c = shape[1]
    sizes = {"x": shape, "residual": shape, "dy": shape, "weight": (c,), "bias": (c,), "mean": (c,)}
    found = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in sizes.items()}
    return found | {"var": torch.rand(c, generator=generator, dtype=torch.float64) + 0.5}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(
    shape: tuple[int, ...], activation: str | None, training: bool
) -> None:
    t = tensors(shape)
    leaves = [t[n].clone().requires_grad_() for n in ("x", "residual", "weight", "bias")]
    x, residual, weight, bias = leaves
    mean, var = t["mean"].clone(), t["var"].clone()
    found, args = resolve(activation)
    v = F.batch_norm(x, mean, var, weight, bias, training, 0.3) + residual
    y = found.function(v, *args) if found else v
    expected = torch.autograd.grad(y, leaves, t["dy"])
    options = {"activation": activation, "residual": t["residual"]}
    f = reference.forward(t["x"], t["mean"], t["var"], t["weight"], t["bias"], training, **options)
    b = reference.backward(
        t["dy"], t["x"], f.mean, f.var, t["weight"], t["bias"], training, **options
    )
    # PyTorch's own hardsigmoid gradient is good to fp32 only, see reference.EXACT.
    tolerance = 1e-6 if activation == "hardsigmoid" else 1e-10
    torch.testing.assert_close(f.y, y.detach(), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip((b.dx, b.dresidual, b.dweight, b.dbias), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if training:
        count = t["x"].numel() // shape[1]
        new = reference.updated_running((t["mean"], t["var"]), f.mean, f.var, count, 0.3, 1)
        torch.testing.assert_close(new, (mean, var), rtol=1e-12, atol=1e-12)


def test_without_parameters() -> None:
    t = tensors((4, 3, 5))
    x = t["x"].clone().requires_grad_()
    y = F.batch_norm(x, None, None, training=True)
    f = reference.forward(t["x"], training=True)
    torch.testing.assert_close(f.y, y.detach(), rtol=1e-12, atol=1e-12)
    (dx,) = torch.autograd.grad(y, x, t["dy"])
    torch.testing.assert_close(
        reference.backward(t["dy"], t["x"], f.mean, f.var).dx, dx, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("at", [-4.0, -3.0, -1.0, 0.0, 2.0, 3.0, 4.0])
def test_exact_hardsigmoid(at: float) -> None:
    v = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    y = reference.EXACT["hardsigmoid"](v)
    assert y.item() == F.hardsigmoid(v).item()
    (g,) = torch.autograd.grad(y, v) if y.requires_grad else (torch.zeros(()),)
    assert g.item() == (1.0 / 6.0 if abs(at) < 3.0 else 0.0)


def test_cumulative_average() -> None:
    mean, var = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    batches = torch.randn(3, 2, dtype=torch.float64)
    for k, m in enumerate(batches, 1):
        mean, var = reference.updated_running((mean, var), m, m.square(), 2, None, k)
    torch.testing.assert_close(mean, batches.mean(0))
    torch.testing.assert_close(var, 2 * batches.square().mean(0))


def test_inference_needs_statistics() -> None:
    with pytest.raises(ValueError, match="running_mean"):
        reference.forward(torch.randn(2, 3))


def test_nothing_is_changed() -> None:
    t = tensors((4, 3, 5))
    before = {n: v.clone() for n, v in t.items()}
    reference.forward(t["x"], t["mean"], t["var"], t["weight"], t["bias"], True)
    reference.backward(t["dy"], t["x"], t["mean"], t["var"], t["weight"])
    assert all(torch.equal(before[n], t[n]) for n in t)
